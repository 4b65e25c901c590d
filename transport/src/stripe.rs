//! Which lane an address has.

/// Remote addresses are dealt to lanes in stripes of this many bytes: a huge page, so that a
/// contiguous run stays one write on one lane, and small enough that lanes share a round evenly.
pub const STRIPE_BYTES: u64 = 2 << 20;

/// The lane that carries every write to `addr`, for the life of a link with `lanes` lanes.
///
/// # Panics
/// If `lanes` is zero, which no link has.
#[must_use]
pub fn lane_of(addr: u64, lanes: usize) -> usize {
    assert!(lanes > 0, "a link has at least one lane");
    usize::try_from((addr / STRIPE_BYTES) % lanes as u64).expect("below the number of lanes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_one_lane_and_stripes_go_round() {
        for lanes in 1..9 {
            for stripe in 0..64u64 {
                let base = stripe * STRIPE_BYTES;
                let lane = lane_of(base, lanes);
                assert_eq!(lane, lane_of(base + STRIPE_BYTES - 1, lanes));
                assert_eq!(lane_of(base + STRIPE_BYTES, lanes), (lane + 1) % lanes);
            }
        }
    }
}
