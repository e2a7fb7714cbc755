//! How long an effect waits before it is tried again. Pure: the jitter comes from the effect itself, so that a crowd that
//! failed together does not come back together, and a test knows what to expect.
//!
//! Tests: at the foot.

/// The wait after the first failure, in milliseconds.
const FIRST_MS: i64 = 500;
/// The longest wait, in milliseconds.
pub(super) const LONGEST_MS: i64 = 5 * 60 * 1000;

/// Milliseconds to wait after `tries` failed tries (1 after the first): doubling from half a second to five minutes, of which
/// `spread` (any number that differs between effects) takes off up to half.
pub(super) fn wait_ms(tries: u32, spread: u64) -> i64 {
    let doublings = tries.saturating_sub(1).min(20);
    let full = FIRST_MS.saturating_mul(1 << doublings).min(LONGEST_MS);
    // Mixed with the try, so that two effects that once fell together part the next time (splitmix64, Steele et al. 2014).
    let mut mix = spread.wrapping_add(u64::from(tries).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mix = (mix ^ (mix >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mix = (mix ^ (mix >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mix ^= mix >> 31;
    let half = full / 2;
    full - (mix % (half.unsigned_abs() + 1)).cast_signed()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_wait_is_between_half_and_all_of_the_doubling(tries in 1u32..200, spread: u64) {
            let full = FIRST_MS.saturating_mul(1i64 << (tries - 1).min(20)).min(LONGEST_MS);
            let wait = wait_ms(tries, spread);
            prop_assert!(wait >= full / 2 && wait <= full, "{wait} of {full}");
        }
    }

    #[test]
    fn waits_of_different_effects_differ() {
        let waits: std::collections::BTreeSet<i64> = (0..100).map(|spread| wait_ms(5, spread)).collect();
        assert!(waits.len() > 90, "{}", waits.len());
    }
}
