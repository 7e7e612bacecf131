//! Bits, least significant first, and Rice codes over them.

/// Unary parts beyond this are not written: an escape and a plain number follow.
const MAX_UNARY: u32 = 48;
const ESCAPED_BITS: u32 = 64;

#[derive(Default)]
pub(super) struct BitWriter {
    out: Vec<u8>,
    pending: u64,
    filled: u32,
}

pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    at: usize,
    pending: u64,
    filled: u32,
}

/// The bits ended early, or say what cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadBits;

// === impl BitWriter ===

impl BitWriter {
    /// Bits that follow `head`, in the memory of `out`.
    pub(super) fn after(head: u8, mut out: Vec<u8>) -> BitWriter {
        out.clear();
        out.push(head);
        BitWriter { out, ..BitWriter::default() }
    }

    /// The low `count` bits of `value`, at most 32 at once.
    #[inline(always)]
    pub(super) fn put(&mut self, value: u64, count: u32) {
        debug_assert!(count <= 32 && value >> count == 0);
        self.pending |= value << self.filled;
        self.filled += count;
        if self.filled >= 32 {
            self.out.extend_from_slice(&(self.pending as u32).to_le_bytes());
            self.pending >>= 32;
            self.filled -= 32;
        }
    }

    /// Short for values around `2^k`, `k` at most 56.
    #[inline(always)]
    pub(super) fn rice(&mut self, value: u64, k: u32) {
        let quotient = value >> k;
        if quotient + u64::from(k) < 32 {
            let unary = (1u64 << quotient) - 1;
            let low = value & ((1 << k) - 1);
            self.put(unary | low << (quotient + 1), quotient as u32 + 1 + k);
        } else {
            self.long_rice(value, quotient, k);
        }
    }

    #[cold]
    fn long_rice(&mut self, value: u64, quotient: u64, k: u32) {
        let mut ones = quotient.min(MAX_UNARY.into()) as u32;
        while ones > 0 {
            let some = ones.min(31);
            self.put((1 << some) - 1, some);
            ones -= some;
        }
        let escaped = quotient >= MAX_UNARY.into();
        let (low, bits) = if escaped {
            (value, ESCAPED_BITS)
        } else {
            self.put(0, 1);
            (value & ((1 << k) - 1), k)
        };
        self.put(low & 0xFFFF_FFFF, bits.min(32));
        self.put(low >> 32, bits.saturating_sub(32));
    }

    /// Elias gamma of `value + 1`: short for small counts without a parameter.
    pub(super) fn gamma(&mut self, value: u32) {
        let value = u64::from(value) + 1;
        let bits = value.ilog2();
        self.put(0, bits);
        self.put(1, 1);
        self.put(value & ((1 << bits) - 1), bits);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        let left = self.filled.div_ceil(8) as usize;
        self.out.extend_from_slice(&self.pending.to_le_bytes()[..left]);
        self.out
    }
}

// === impl BitReader ===

impl<'a> BitReader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> BitReader<'a> {
        BitReader { bytes, at: 0, pending: 0, filled: 0 }
    }

    /// At least 56 valid bits, where there are so many.
    #[inline]
    fn refill(&mut self) {
        if let Some(next) = self.bytes.get(self.at..self.at + 8) {
            self.pending |= u64::from_le_bytes(next.try_into().expect("8 bytes")) << self.filled;
            let taken = (63 - self.filled) / 8;
            self.at += taken as usize;
            self.filled += taken * 8;
            return;
        }
        while self.filled <= 56 && self.at < self.bytes.len() {
            self.pending |= u64::from(self.bytes[self.at]) << self.filled;
            self.at += 1;
            self.filled += 8;
        }
    }

    #[inline]
    pub(super) fn take(&mut self, count: u32) -> Result<u64, BadBits> {
        debug_assert!(count <= 56);
        if self.filled < count {
            self.refill();
            if self.filled < count {
                return Err(BadBits);
            }
        }
        let value = self.pending & ((1 << count) - 1);
        self.skip(count);
        Ok(value)
    }

    #[inline]
    fn skip(&mut self, count: u32) {
        self.pending >>= count;
        self.filled -= count;
    }

    /// A Rice code and the bit after it.
    #[inline(always)]
    pub(super) fn rice_and_bit(&mut self, k: u32) -> Result<(u64, u64), BadBits> {
        self.refill();
        let quotient = self.pending.trailing_ones();
        let used = quotient + k + 2;
        if used > self.filled || quotient >= MAX_UNARY {
            return Ok((self.rice(k)?, self.take(1)?));
        }
        let rest = self.pending >> (quotient + 1);
        let low = rest & ((1 << k) - 1);
        self.skip(used);
        Ok((u64::from(quotient) << k | low, rest >> k & 1))
    }

    #[inline]
    pub(super) fn rice(&mut self, k: u32) -> Result<u64, BadBits> {
        if self.filled < MAX_UNARY + 1 {
            self.refill();
        }
        let quotient = self.pending.trailing_ones();
        if quotient < MAX_UNARY {
            if self.filled <= quotient {
                return Err(BadBits);
            }
            self.skip(quotient + 1);
            return Ok(u64::from(quotient) << k | self.take(k)?);
        }
        if self.filled < MAX_UNARY {
            return Err(BadBits);
        }
        self.skip(MAX_UNARY);
        Ok(self.take(32)? | self.take(ESCAPED_BITS - 32)? << 32)
    }

    /// Nothing follows but the rest of the last byte.
    pub(super) fn finish(mut self) -> Result<(), BadBits> {
        self.refill();
        let rest = self.pending & ((1 << self.filled.min(8)) - 1);
        if self.filled < 8 && rest == 0 { Ok(()) } else { Err(BadBits) }
    }

    pub(super) fn gamma(&mut self) -> Result<u32, BadBits> {
        let mut bits = 0;
        while self.take(1)? == 0 {
            bits += 1;
            if bits > 32 {
                return Err(BadBits);
            }
        }
        u32::try_from((1 << bits | self.take(bits)?) - 1).map_err(|_| BadBits)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn codes_come_back(
            items in proptest::collection::vec((any::<u64>(), 0u32..64, 0u32..40), 0..300),
        ) {
            let mut w = BitWriter::default();
            for &(value, shift, k) in &items {
                let value = value >> shift;
                w.rice(value, k);
                w.gamma((value >> 33) as u32);
                w.put(value & 0x1F, 5);
            }
            let bytes = w.finish();
            let mut r = BitReader::new(&bytes);
            for &(value, shift, k) in &items {
                let value = value >> shift;
                prop_assert_eq!(r.rice(k), Ok(value));
                prop_assert_eq!(r.gamma(), Ok((value >> 33) as u32));
                prop_assert_eq!(r.take(5), Ok(value & 0x1F));
            }
            prop_assert_eq!(r.finish(), Ok(()));
        }

        #[test]
        fn any_bytes_end_in_an_error_not_in_a_loop(bytes: Vec<u8>, k in 0u32..40) {
            let mut r = BitReader::new(&bytes);
            let mut read = 0;
            while r.rice(k).is_ok() && r.gamma().is_ok() { read += 1; }
            prop_assert!(read <= bytes.len() * 8);
        }
    }
}
