//! The regions that a target lets its peer write, and the one check that stands between an address
//! from the wire and memory.
//!
//! Every region gets a range of addresses of its own, so that an address with the wrong key is
//! caught, and so that the peer learns nothing of this process's address space. Bases are stripe
//! aligned, which puts lane boundaries on huge pages.

use crate::error::{Error, Result};
use crate::region::{MemoryRegion, RemoteKey, RemoteRegion};
use crate::stripe::STRIPE_BYTES;
use std::sync::Arc;

/// Base of the first region. Not zero, so that a peer that forgot to add a base is caught.
const FIRST_BASE: u64 = 1 << 32;

/// What is exposed now. The key of a region is its index.
#[derive(Debug)]
pub(crate) struct Exposed {
    regions: Vec<(RemoteRegion, Arc<MemoryRegion>)>,
    base_next: u64,
    revoked: bool,
}

impl Exposed {
    pub(crate) fn new() -> Self {
        Self { regions: Vec::new(), base_next: FIRST_BASE, revoked: false }
    }

    pub(crate) fn expose(&mut self, region: &Arc<MemoryRegion>) -> Result<RemoteRegion> {
        if self.revoked {
            return Err(Error::State("exposing a region after the link was revoked"));
        }
        if !region.writable() {
            return Err(Error::State("exposing a region that is mapped read-only"));
        }
        let too_much = || Error::Bounds { what: "too much memory for one link's addresses".into() };
        let key = RemoteKey(u32::try_from(self.regions.len()).map_err(|_| too_much())?);
        let len = region.len() as u64;
        let remote = RemoteRegion { base: self.base_next, len, key };
        // A stripe of nothing between two regions, so that running off the end hits no neighbour.
        let taken = len
            .checked_next_multiple_of(STRIPE_BYTES)
            .and_then(|len| len.checked_add(STRIPE_BYTES));
        self.base_next =
            taken.and_then(|taken| self.base_next.checked_add(taken)).ok_or_else(too_much)?;
        self.regions.push((remote, Arc::clone(region)));
        Ok(remote)
    }

    /// Where the peer's `[addr, addr + len)` lies, or what is wrong with it.
    pub(crate) fn place(
        &self,
        key: u32,
        addr: u64,
        len: u32,
    ) -> Result<(&Arc<MemoryRegion>, usize), String> {
        let (remote, region) = self
            .regions
            .get(key as usize)
            .ok_or_else(|| format!("a write with the key {key}, which no exposed region has"))?;
        let outside = || {
            format!(
                "a write of {len} bytes at {addr:#x}, outside the region of {:#x} bytes at {:#x}",
                remote.len, remote.base
            )
        };
        let offset = addr.checked_sub(remote.base).ok_or_else(outside)?;
        let end = offset.checked_add(u64::from(len)).ok_or_else(outside)?;
        if end > remote.len {
            return Err(outside());
        }
        Ok((region, usize::try_from(offset).map_err(|_| outside())?))
    }

    /// Forgets every region and refuses new ones.
    pub(crate) fn revoke(&mut self) {
        self.regions.clear();
        self.revoked = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exposed(sizes: &[usize]) -> (Exposed, Vec<RemoteRegion>) {
        let mut exposed = Exposed::new();
        let remotes = sizes
            .iter()
            .map(|&len| exposed.expose(&MemoryRegion::anonymous(len).unwrap()).unwrap())
            .collect();
        (exposed, remotes)
    }

    #[test]
    fn a_key_opens_its_own_region_only() {
        let (exposed, remotes) = exposed(&[4096, 3 << 20]);
        assert!(exposed.place(remotes[1].key.0, remotes[1].base, 4096).is_ok());
        assert!(exposed.place(remotes[0].key.0, remotes[1].base, 4096).is_err());
        assert!(exposed.place(2, remotes[1].base, 1).is_err());
    }

    #[test]
    fn nothing_is_exposed_after_revoke() {
        let (mut exposed, remotes) = exposed(&[4096]);
        exposed.revoke();
        assert!(exposed.place(remotes[0].key.0, remotes[0].base, 1).is_err());
        assert!(exposed.expose(&MemoryRegion::anonymous(4096).unwrap()).is_err());
    }

    proptest! {
        #[test]
        fn what_is_placed_lies_inside(key in 0u32..4, addr: u64, near in 0u64..10_000, len: u32, small in 0u32..9000) {
            let (exposed, remotes) = exposed(&[4096, 8192]);
            let base = remotes[key as usize % 2].base;
            for (addr, len) in [(addr, len), (base.wrapping_add(near), small), (base, len), (addr, small)] {
                if let Ok((region, offset)) = exposed.place(key, addr, len) {
                    prop_assert!(region.check(offset, len as usize).is_ok());
                    prop_assert_eq!(remotes[key as usize].base + offset as u64, addr);
                }
            }
        }
    }
}
