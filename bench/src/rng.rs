//! Seeded choices: the same seed plans the same faults and prompts. `fastrand` with the draws that benches make.

/// A seeded stream of choices.
#[derive(Clone, Debug)]
pub struct Rng(fastrand::Rng);

impl Rng {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    /// Uniform 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// Uniform in `[low, high)`; `low` if that is empty.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        self.0.u64(low..high.max(low + 1))
    }

    /// Puts `items` into a random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        self.0.shuffle(items);
    }

    /// A prompt of `len` token ids from a vocabulary whose first 16 ids are special.
    pub fn prompt(&mut self, len: u64, vocab: u32) -> Vec<u32> {
        (0..len).map(|_| self.range(16, u64::from(vocab)) as u32).collect()
    }
}
