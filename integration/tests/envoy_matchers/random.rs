//! A generator of numbers, the same for the same seed on every machine. `WEFT_MATCHER_SEED` adds to the seeds
//! of all tests, to try other matchers and requests.

/// SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let more = std::env::var("WEFT_MATCHER_SEED").ok().and_then(|text| text.parse().ok());
        Self(seed.wrapping_add(more.unwrap_or(0)))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).expect("usize fits");
        usize::try_from(self.next() % end).expect("it is below a usize")
    }

    /// One of these.
    pub(crate) fn of<'t, T>(&mut self, all: &'t [T]) -> &'t T {
        all.get(self.below(all.len())).expect("a list is not empty")
    }

    /// Whether one of `in_how_many` draws falls on this.
    pub(crate) fn one_in(&mut self, in_how_many: usize) -> bool {
        self.below(in_how_many) == 0
    }
}
