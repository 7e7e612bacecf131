//! The one source of chance of a world: `fastrand` with the choices that worlds make.

/// A seeded stream of choices.
pub(crate) struct Rng(fastrand::Rng);

impl Rng {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    /// Uniform 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// Uniform in [low, high); `low` if that is empty.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        self.0.u64(low..high.max(low + 1))
    }

    /// True in `percent` of 100 draws.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.range(0, 100) < percent
    }

    /// One item of `from`; `None` if that is empty.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        self.0.choice(from)
    }
}
