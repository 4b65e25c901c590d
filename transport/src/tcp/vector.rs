//! A scatter-gather vector and its `msghdr`, for `recvmsg` and `sendmsg` that may stop half way.

use std::ptr;

/// Pieces of memory that remain to be sent or filled. Addresses are plain numbers here: whoever
/// gives [`Self::message`] to the kernel answers for what they point to.
#[derive(Debug)]
pub(super) struct Vector {
    pieces: Vec<libc::iovec>,
    /// Pieces before this one are done.
    first: usize,
    /// Boxed, as the kernel reads it where it lies.
    message: Box<libc::msghdr>,
}

// SAFETY: the raw pointers are addresses only; this type never follows them.
unsafe impl Send for Vector {}

impl Vector {
    pub(super) fn with_capacity(pieces: usize) -> Self {
        // SAFETY: a msghdr of zeros is valid: no name, no vector, no control data.
        let message = Box::new(unsafe { std::mem::zeroed() });
        Self { pieces: Vec::with_capacity(pieces), first: 0, message }
    }

    /// Starts anew, keeping the memory.
    pub(super) fn clear(&mut self) {
        self.pieces.clear();
        self.first = 0;
    }

    /// Appends `len` bytes at `address`; nothing if `len` is zero.
    pub(super) fn push(&mut self, address: usize, len: usize) {
        if len > 0 {
            let iov_base = ptr::with_exposed_provenance_mut(address);
            self.pieces.push(libc::iovec { iov_base, iov_len: len });
        }
    }

    /// Whether everything is done.
    pub(super) fn is_empty(&self) -> bool {
        self.first == self.pieces.len()
    }

    /// Address and length of what is not done.
    pub(super) fn rest(&self) -> impl Iterator<Item = (usize, usize)> {
        self.pieces[self.first..]
            .iter()
            .map(|piece| (piece.iov_base.expose_provenance(), piece.iov_len))
    }

    /// Crosses off the first `bytes` bytes.
    ///
    /// # Panics
    /// If there are fewer: the kernel never moves more than it was given.
    pub(super) fn advance(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let piece = &mut self.pieces[self.first];
            let step = bytes.min(piece.iov_len);
            piece.iov_base = piece.iov_base.wrapping_byte_add(step);
            piece.iov_len -= step;
            bytes -= step;
            if piece.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// What remains, as the kernel wants it. Valid until this vector is next touched or dropped.
    pub(super) fn message(&mut self) -> *mut libc::msghdr {
        self.message.msg_iov = self.pieces[self.first..].as_mut_ptr();
        self.message.msg_iovlen = self.pieces.len() - self.first;
        &raw mut *self.message
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn advancing_crosses_off_exactly_so_many_bytes(
            lens in prop::collection::vec(0usize..50, 0..20), cuts in prop::collection::vec(1usize..60, 0..40),
        ) {
            let mut vector = Vector::with_capacity(0);
            let mut bytes = Vec::new();
            for (index, &len) in lens.iter().enumerate() {
                vector.push((index + 1) * 1000, len);
                bytes.extend((0..len).map(|at| (index + 1) * 1000 + at));
            }
            let mut done = 0;
            for cut in cuts {
                let cut = cut.min(bytes.len() - done);
                vector.advance(cut);
                done += cut;
                let left: Vec<_> = vector.pieces[vector.first..]
                    .iter()
                    .flat_map(|piece| (0..piece.iov_len).map(|at| piece.iov_base.addr() + at))
                    .collect();
                prop_assert_eq!(&left, &bytes[done..]);
                prop_assert_eq!(vector.is_empty(), done == bytes.len());
            }
        }
    }
}
