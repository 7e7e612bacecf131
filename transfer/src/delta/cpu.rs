//! Code for one kind of processor: the coder of a block is compiled three times, and these few functions
//! are written for each. Owns the `unsafe` of the codec; decides nothing about the format.
#![allow(unsafe_code)]

use anabranch_proto::manifest::DType;

use super::bits::BadBits;
use super::block::{self, Scratch};
use super::element::{Bf16, Byte, Element, F8E4M3, F8E5M2, F16, F32, GROUP, Int, Long, Word};

/// Functions that have an instruction of their own on some processors.
pub(super) trait Cpu {
    /// The bit at `bit` of every byte.
    fn bit_of_each(bytes: &[u8; GROUP], bit: u32) -> u64;

    /// Index of the `nth` set bit, from 0.
    fn select(mask: u64, nth: u32) -> u32;

    /// Begins to load what is at `at`, if there is anything.
    fn prefetch(bytes: &[u8], at: usize);

    /// Like `prefetch`, for bytes that will be written.
    fn prefetch_to(bytes: &[u8], at: usize);
}

/// Any processor of the architecture that this was compiled for.
pub(super) struct Any;

/// Work on one block, for any kind of element.
trait Work {
    type Out;

    fn run<C: Cpu, E: Element>(self) -> Self::Out;
}

struct Encode<'a> {
    head: u8,
    old: &'a [u8],
    new: &'a [u8],
    scratch: &'a mut Scratch,
    out: &'a mut Vec<u8>,
}

struct Apply<'a> {
    payload: &'a [u8],
    base: Option<&'a [u8]>,
    block: &'a mut [u8],
    scratch: &'a mut Scratch,
}

/// False if nothing changed; else `out` is `head` and what follows it.
pub(super) fn encode(
    dtype: DType,
    head: u8,
    old: &[u8],
    new: &[u8],
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) -> bool {
    for_dtype(dtype, Encode { head, old, new, scratch, out })
}

/// `block` gets the new bytes; the old ones are `base`, or in `block`.
pub(super) fn apply(
    dtype: DType,
    payload: &[u8],
    base: Option<&[u8]>,
    block: &mut [u8],
    scratch: &mut Scratch,
) -> Result<(), BadBits> {
    for_dtype(dtype, Apply { payload, base, block, scratch })
}

fn for_dtype<W: Work>(dtype: DType, work: W) -> W::Out {
    match dtype {
        DType::BF16 => for_cpu::<Bf16, W>(work),
        DType::F16 => for_cpu::<F16, W>(work),
        DType::F32 => for_cpu::<F32, W>(work),
        DType::F8E4M3 => for_cpu::<F8E4M3, W>(work),
        DType::F8E5M2 => for_cpu::<F8E5M2, W>(work),
        DType::Bool | DType::U8 | DType::I8 | DType::F8E8M0 => for_cpu::<Byte, W>(work),
        DType::I16 | DType::U16 => for_cpu::<Word, W>(work),
        DType::I32 | DType::U32 => for_cpu::<Int, W>(work),
        DType::I64 | DType::U64 | DType::F64 => for_cpu::<Long, W>(work),
    }
}

#[cfg(target_arch = "x86_64")]
use x86::for_cpu;

#[cfg(not(target_arch = "x86_64"))]
fn for_cpu<E: Element, W: Work>(work: W) -> W::Out {
    work.run::<Any, E>()
}

#[cfg(target_arch = "x86_64")]
mod x86;

// === impl Cpu ===

impl Cpu for Any {
    #[inline(always)]
    fn bit_of_each(bytes: &[u8; GROUP], bit: u32) -> u64 {
        const LOW: u64 = 0x0101_0101_0101_0101;
        // Byte n's lowest bit times 2^(56 - 7n) lands in bit 56 + n of the product.
        const GATHER: u64 = 0x0102_0408_1020_4080;
        let mut out = 0;
        for (at, eight) in bytes.as_chunks().0.iter().enumerate() {
            let eight = u64::from_le_bytes(*eight) >> bit & LOW;
            out |= (eight.wrapping_mul(GATHER) >> 56) << (8 * at);
        }
        out
    }

    #[inline(always)]
    fn select(mask: u64, nth: u32) -> u32 {
        let (mut mask, mut nth, mut at) = (mask, nth, 0);
        for half in [32, 16, 8, 4, 2, 1] {
            let below = (mask & ((1 << half) - 1)).count_ones();
            let (skip, skipped) = if nth >= below { (half, below) } else { (0, 0) };
            nth -= skipped;
            mask >>= skip;
            at += skip;
        }
        at
    }

    #[inline(always)]
    fn prefetch(_: &[u8], _: usize) {}

    #[inline(always)]
    fn prefetch_to(_: &[u8], _: usize) {}
}

// === impl Work ===

impl Work for Encode<'_> {
    type Out = bool;

    #[inline(always)]
    fn run<C: Cpu, E: Element>(self) -> bool {
        block::encode::<C, E>(self.head, self.old, self.new, self.scratch, self.out)
    }
}

impl Work for Apply<'_> {
    type Out = Result<(), BadBits>;

    #[inline(always)]
    fn run<C: Cpu, E: Element>(self) -> Result<(), BadBits> {
        block::apply::<C, E>(self.payload, self.base, self.block, self.scratch)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(super) fn agrees<C: Cpu>(bytes: [u8; 32], more: [u8; 32]) -> Result<(), TestCaseError> {
        let all: [u8; GROUP] = [bytes, more].concat().try_into().expect("64 bytes");
        for bit in 0..8 {
            let slow = (0..GROUP).map(|at| u64::from(all[at] >> bit & 1) << at).sum::<u64>();
            prop_assert_eq!(C::bit_of_each(&all, bit), slow);
            let set = (0..GROUP as u32).filter(|at| slow >> at & 1 == 1);
            for (nth, place) in set.enumerate() {
                prop_assert_eq!(C::select(slow, nth as u32), place);
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn the_functions_of_any_processor_are_right(bytes: [u8; 32], more: [u8; 32]) {
            agrees::<Any>(bytes, more)?;
        }
    }
}
