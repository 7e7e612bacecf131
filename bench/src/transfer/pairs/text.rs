//! Text to train on: made-up words with frequencies as in a language (Zipf's), each half determined by the one before.

use crate::rng::Rng;

const WORDS: usize = 2000;

/// A stream of made-up words.
pub struct Text {
    rng: Rng,
    words: Vec<Vec<u8>>,
    /// Running sums of the words' frequencies.
    up_to: Vec<f64>,
    last: usize,
    pending: Vec<u8>,
}

// === impl Text ===

impl Text {
    /// The stream from its start, always the same.
    pub fn new() -> Text {
        let mut rng = Rng::new(0x7e87);
        let letters = b"etaoinshrdlcumwfgypbvk";
        let word = |_| {
            let len = rng.range(2, 10);
            // The lower of two draws: early letters are the usual ones.
            let letter = |rng: &mut Rng| rng.range(0, 22).min(rng.range(0, 22)) as usize;
            (0..len).map(|_| letters[letter(&mut rng)]).collect()
        };
        let words: Vec<Vec<u8>> = (0..WORDS).map(word).collect();
        let mut sum = 0.0;
        let up_to = (1..=WORDS).map(|rank| {
            sum += 1.0 / rank as f64;
            sum
        });
        Text { up_to: up_to.collect(), rng, words, last: 0, pending: Vec::new() }
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: usize) -> Vec<u8> {
        while self.pending.len() < count {
            self.last = self.next_word();
            self.pending.extend_from_slice(&self.words[self.last]);
            let end = if self.rng.range(0, 12) == 0 { b'.' } else { b' ' };
            self.pending.push(end);
        }
        self.pending.drain(..count).collect()
    }

    fn next_word(&mut self) -> usize {
        if self.rng.next() & 1 == 0 {
            return (self.last * 31 + 7) % WORDS;
        }
        let total = self.up_to.last().copied().unwrap_or_default();
        let at = self.rng.range(0, 1 << 32) as f64 / (1u64 << 32) as f64 * total;
        self.up_to.partition_point(|up_to| *up_to < at).min(WORDS - 1)
    }
}
