//! What a guest in QEMU can see of its machine, asked at both ends and compared before it is
//! touched.
//!
//! ```text
//!   gather    QMP -> Platform        at the source in preflight, at the destination when a guest comes
//!   Hello     Platform, packed       at most PLATFORM_BYTES_MAX
//!   compare   two of them -> differences, in words of the command line
//! ```
//!
//! QEMU itself compares hardly any of it: it takes another CPU model without a word, and the guest
//! dies.

mod admit;
mod compare;
pub mod gather;
mod qtree;

pub use admit::admit;
pub use compare::{Difference, Weight, compare};
pub use gather::Gatherer;

use pageferry_engine::error::{Error, Result};
use pageferry_engine::guest::PLATFORM_BYTES_MAX;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use xxhash_rust::xxh3::xxh3_64;

/// The form of a packed description; another one is another release's.
const FORM: u8 = 1;
/// The name under which a digest stands for all properties of a device.
const DIGEST: &str = "properties";

/// Names and values, as texts.
pub type Properties = BTreeMap<String, String>;

/// A device, found by its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `virtio-net-pci`.
    pub kind: String,
    /// The operator's name for it, or nothing.
    pub id: String,
    /// Its properties, without those of the host's side.
    pub properties: Properties,
}

/// See the [module](self).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// QEMU's version: another one has properties that this one does not know.
    pub version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The model's name.
    pub cpu_model: String,
    /// What the vCPUs have: features, level, family.
    pub cpu: Properties,
    /// `sockets`, `cores`, `threads`, `maxcpus`.
    pub smp: Properties,
    /// Which of the possible vCPUs are plugged in.
    pub vcpus: Vec<String>,
    /// Of the machine: `hpet`, `smm`, `memory.max-size`.
    pub machine: Properties,
    /// Lines of NUMA nodes.
    pub numa: Vec<String>,
    /// The system's UUID.
    pub uuid: String,
    /// `-smbios`, `-acpitable` and `-fw_cfg`: what it is, and a digest of the option.
    pub tables: BTreeMap<String, u64>,
    /// RAM blocks with their sizes; of those that QEMU makes as large as it needs, zero.
    pub blocks: BTreeMap<String, u64>,
    /// All devices by their places: `pcie.0/02.0`.
    pub devices: BTreeMap<String, Device>,
}

impl Platform {
    /// For Hello. What does not fit is replaced by digests: then a device's difference is found and
    /// not named. A guest of some hundreds of devices is longer all the same.
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let packed = |platform: &Self| {
            let mut bytes = vec![FORM];
            // Only a sequence of unknown length could fail, and there is none.
            bytes.extend(postcard::to_allocvec(platform).unwrap_or_default());
            bytes
        };
        let whole = packed(self);
        if whole.len() <= PLATFORM_BYTES_MAX {
            return whole;
        }
        let mut short = self.clone();
        short.devices.values_mut().for_each(Device::shorten);
        short.vcpus = in_short(&self.vcpus);
        packed(&short)
    }

    /// From Hello.
    pub fn unpack(bytes: &[u8]) -> Result<Self> {
        let odd = || {
            Error::refused(
                "the source's description of its guest is not understood: both ends must be of the same release",
            )
        };
        let (form, body) = bytes.split_first().ok_or_else(odd)?;
        let (platform, rest) = postcard::take_from_bytes(body).map_err(|_| odd())?;
        if *form == FORM && rest.is_empty() { Ok(platform) } else { Err(odd()) }
    }
}

/// The number of some texts and their digest: the places of a thousand vCPUs would fill Hello.
fn in_short(texts: &[String]) -> Vec<String> {
    vec![format!("{}, {:016x}", texts.len(), xxh3_64(texts.join("\n").as_bytes()))]
}

impl Device {
    /// Replaces its properties by their digest.
    fn shorten(&mut self) {
        if self.is_short() {
            return;
        }
        // What only warns would refuse as part of a digest.
        self.properties.retain(|name, _| !compare::WARN_OF_DEVICE.contains(&name.as_str()));
        let all = format!("{:?}", self.properties);
        self.properties = [(DIGEST.to_owned(), format!("{:016x}", xxh3_64(all.as_bytes())))].into();
    }

    fn is_short(&self) -> bool {
        self.properties.len() == 1 && self.properties.contains_key(DIGEST)
    }
}
