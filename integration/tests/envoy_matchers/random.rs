//! A random number generator whose sequence depends on the seed only. `WEFT_MATCHER_SEED` is added to the seeds of all
//! tests, to try other matchers and requests.

/// A SplitMix64 generator.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let offset = std::env::var("WEFT_MATCHER_SEED").ok().and_then(|text| text.parse().ok());
        Self(seed.wrapping_add(offset.unwrap_or(0)))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).expect("usize fits into u64");
        usize::try_from(self.next() % end).expect("the result is below a usize")
    }

    /// A random element.
    pub(crate) fn of<'t, T>(&mut self, all: &'t [T]) -> &'t T {
        all.get(self.below(all.len())).expect("the slice is not empty")
    }

    /// True with a probability of 1 in `count`.
    pub(crate) fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}
