//! Elements as integers in the order of their values, so that a small step of the optimizer is a small
//! difference, and the exponent that tells how likely an element is to change at all.

/// Elements that are looked at together.
pub(super) const GROUP: usize = 64;

pub(super) const MAX_CLASSES: usize = 8;

/// One element of a block.
pub(super) trait Element {
    const BYTES: usize;
    /// 8, or 1 for kinds without an exponent.
    const CLASSES: usize;

    /// The class of each: how far its exponent is below `top`, the last class holding the rest.
    fn classes(group: &[u8], top: u8) -> [u8; GROUP];

    /// 1 for each that differs.
    fn differing(old: &[u8], new: &[u8]) -> [u8; GROUP];

    fn read(bytes: &[u8], index: usize) -> u64;
    fn write(bytes: &mut [u8], index: usize, bits: u64);

    /// The coarse size of the value; 0 for kinds without an exponent.
    fn exponent(bits: u64) -> u8;

    #[inline(always)]
    fn class(bits: u64, top: u8) -> u8 {
        let class = top.saturating_sub(Self::exponent(bits)).min(MAX_CLASSES as u8 - 1);
        if Self::CLASSES > 1 { class } else { 0 }
    }

    /// Bits to a number in value order; sign-magnitude is unfolded.
    fn ordered(bits: u64) -> u64;
    fn from_ordered(ordered: u64) -> u64;

    /// Zigzag of the step from `old` to `new`; never 0 for different bits.
    #[inline]
    fn step(old: u64, new: u64) -> u64 {
        let unused = 64 - 8 * Self::BYTES as u32;
        let step = (Self::ordered(new).wrapping_sub(Self::ordered(old)) << unused) as i64 >> unused;
        ((step << 1) ^ (step >> 63)) as u64
    }

    #[inline]
    fn apply(old: u64, zigzag: u64) -> u64 {
        let step = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
        let mask = u64::MAX >> (64 - 8 * Self::BYTES as u32);
        Self::from_ordered(Self::ordered(old).wrapping_add(step as u64) & mask)
    }
}

macro_rules! element {
    ($name:ident, $int:ty, $exponent:expr, $float:expr) => {
        pub(super) struct $name;

        impl Element for $name {
            const BYTES: usize = size_of::<$int>();
            const CLASSES: usize = if $float { MAX_CLASSES } else { 1 };

            #[inline(always)]
            fn classes(group: &[u8], top: u8) -> [u8; GROUP] {
                let group: &[u8; GROUP * Self::BYTES] = group.try_into().expect("a whole group");
                let mut out = [0; GROUP];
                if Self::CLASSES == 1 {
                    return out;
                }
                for (out, raw) in out.iter_mut().zip(group.as_chunks().0) {
                    let exponent: fn($int) -> $int = $exponent;
                    let below = top.saturating_sub(exponent(<$int>::from_le_bytes(*raw)) as u8);
                    *out = below.min(MAX_CLASSES as u8 - 1);
                }
                out
            }

            #[inline(always)]
            fn differing(old: &[u8], new: &[u8]) -> [u8; GROUP] {
                let old: &[u8; GROUP * Self::BYTES] = old.try_into().expect("a whole group");
                let new: &[u8; GROUP * Self::BYTES] = new.try_into().expect("a whole group");
                let mut out = [0; GROUP];
                let pairs =
                    old.as_chunks::<{ size_of::<$int>() }>().0.iter().zip(new.as_chunks().0);
                for (out, (old, new)) in out.iter_mut().zip(pairs) {
                    *out = u8::from(<$int>::from_le_bytes(*old) != <$int>::from_le_bytes(*new));
                }
                out
            }

            #[inline]
            fn read(bytes: &[u8], index: usize) -> u64 {
                let at = index * Self::BYTES;
                let raw = bytes[at..at + Self::BYTES].try_into().expect("an element's bytes");
                <$int>::from_le_bytes(raw).into()
            }

            #[inline]
            fn write(bytes: &mut [u8], index: usize, bits: u64) {
                let at = index * Self::BYTES;
                bytes[at..at + Self::BYTES].copy_from_slice(&(bits as $int).to_le_bytes());
            }

            #[inline]
            fn exponent(bits: u64) -> u8 {
                let exponent: fn($int) -> $int = $exponent;
                exponent(bits as $int) as u8
            }

            #[inline]
            fn ordered(bits: u64) -> u64 {
                let bits = bits as $int;
                let top: $int = 1 << (<$int>::BITS - 1);
                (if !$float {
                    bits
                } else if bits & top == 0 {
                    bits | top
                } else {
                    !bits
                })
                .into()
            }

            #[inline]
            fn from_ordered(ordered: u64) -> u64 {
                let ordered = ordered as $int;
                let top: $int = 1 << (<$int>::BITS - 1);
                (if !$float {
                    ordered
                } else if ordered & top != 0 {
                    ordered & !top
                } else {
                    !ordered
                })
                .into()
            }
        }
    };
}

element!(Bf16, u16, |b| b >> 7 & 0xFF, true);
element!(F16, u16, |b| b >> 10 & 0x1F, true);
element!(F32, u32, |b| b >> 23 & 0xFF, true);
element!(F8E4M3, u8, |b| b >> 3 & 0x0F, true);
element!(F8E5M2, u8, |b| b >> 2 & 0x1F, true);
element!(Byte, u8, |_| 0, false);
element!(Word, u16, |_| 0, false);
element!(Int, u32, |_| 0, false);
element!(Long, u64, |_| 0, false);

#[cfg(test)]
mod tests {
    use super::*;

    fn check<E: Element>(old: u64, new: u64) {
        let zigzag = E::step(old, new);
        assert_eq!(E::apply(old, zigzag), new, "{old:#x} -> {new:#x}");
        assert_eq!(zigzag == 0, old == new, "{old:#x} -> {new:#x}");
    }

    #[test]
    fn steps_undo_for_all_pairs_of_bytes_and_the_corners_of_wider_kinds() {
        for old in 0..256 {
            for new in 0..256 {
                check::<F8E4M3>(old, new);
                check::<F8E5M2>(old, new);
                check::<Byte>(old, new);
            }
        }
        // Zeros of both signs, infinities, NaNs with payload, the smallest and the largest.
        let corners = [0, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 1, 0x8001, 0x3F80, 0xBF80];
        for old in corners {
            for new in corners {
                check::<Bf16>(old, new);
                check::<F16>(old, new);
                check::<Word>(old, new);
                check::<F32>(old << 16, new << 16 | 0xFFFF);
                check::<Int>(old << 16 | 3, new << 16);
                check::<Long>(old << 48, new << 48 | new);
            }
        }
    }

    #[test]
    fn neighbours_in_value_are_one_step_apart_through_zero() {
        let around_zero = [0x8002u64, 0x8001, 0x8000, 0x0000, 0x0001, 0x0002];
        for pair in around_zero.windows(2) {
            assert_eq!((Bf16::step(pair[0], pair[1]), Bf16::step(pair[1], pair[0])), (2, 1));
        }
    }
}
