//! The three levels of x86-64 that the codec is compiled for.

use std::arch::is_x86_feature_detected as has;
use std::arch::x86_64::*;

use super::{Any, Cpu, Element, GROUP, Work};

/// All have SSE2.
struct Plain;
struct Avx2;
struct Avx512;

pub(super) fn for_cpu<E: Element, W: Work>(work: W) -> W::Out {
    let bits = has!("bmi1") && has!("bmi2") && has!("lzcnt") && has!("popcnt");
    if bits && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512vpopcntdq") {
        // SAFETY: the processor has every feature that the function was compiled for.
        return unsafe { with_avx512::<E, W>(work) };
    }
    if bits && has!("avx2") {
        // SAFETY: as above.
        return unsafe { with_avx2::<E, W>(work) };
    }
    work.run::<Plain, E>()
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vpopcntdq,bmi1,bmi2,lzcnt,popcnt")]
fn with_avx512<E: Element, W: Work>(work: W) -> W::Out {
    work.run::<Avx512, E>()
}

#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn with_avx2<E: Element, W: Work>(work: W) -> W::Out {
    work.run::<Avx2, E>()
}

// === impl Cpu ===

impl Cpu for Plain {
    #[inline(always)]
    fn bit_of_each(bytes: &[u8; GROUP], bit: u32) -> u64 {
        let mut out = 0;
        for (at, sixteen) in bytes.as_chunks::<16>().0.iter().enumerate() {
            // SAFETY: every x86-64 processor has SSE2; 16 bytes are read from an array of 16.
            let bits = unsafe {
                let bytes = _mm_loadu_si128(sixteen.as_ptr().cast());
                _mm_movemask_epi8(_mm_sll_epi16(bytes, _mm_cvtsi32_si128(7 - bit as i32)))
            };
            out |= u64::from(bits as u16) << (16 * at);
        }
        out
    }

    #[inline(always)]
    fn select(mask: u64, nth: u32) -> u32 {
        Any::select(mask, nth)
    }

    #[inline(always)]
    fn prefetch(bytes: &[u8], at: usize) {
        if at < bytes.len() {
            // SAFETY: the address is inside `bytes`; a prefetch changes nothing but caches.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().add(at).cast()) };
        }
    }

    #[inline(always)]
    fn prefetch_to(bytes: &[u8], at: usize) {
        if at < bytes.len() {
            // SAFETY: as above.
            unsafe { _mm_prefetch::<_MM_HINT_ET0>(bytes.as_ptr().add(at).cast()) };
        }
    }
}

impl Cpu for Avx2 {
    #[inline(always)]
    fn bit_of_each(bytes: &[u8; GROUP], bit: u32) -> u64 {
        let mut out = 0;
        for (at, half) in bytes.as_chunks::<32>().0.iter().enumerate() {
            // SAFETY: `for_cpu` runs this only with AVX2; 32 bytes are read from an array of 32.
            let bits = unsafe {
                let bytes = _mm256_loadu_si256(half.as_ptr().cast());
                _mm256_movemask_epi8(_mm256_sll_epi16(bytes, _mm_cvtsi32_si128(7 - bit as i32)))
            };
            out |= u64::from(bits as u32) << (32 * at);
        }
        out
    }

    #[inline(always)]
    fn select(mask: u64, nth: u32) -> u32 {
        // SAFETY: `for_cpu` runs this only with BMI2; no memory is touched.
        unsafe { _pdep_u64(1 << nth, mask) }.trailing_zeros()
    }

    #[inline(always)]
    fn prefetch(bytes: &[u8], at: usize) {
        Plain::prefetch(bytes, at);
    }

    #[inline(always)]
    fn prefetch_to(bytes: &[u8], at: usize) {
        Plain::prefetch_to(bytes, at);
    }
}

impl Cpu for Avx512 {
    #[inline(always)]
    fn bit_of_each(bytes: &[u8; GROUP], bit: u32) -> u64 {
        // SAFETY: `for_cpu` runs this only with AVX-512BW; 64 bytes are read from an array of 64.
        unsafe {
            let bytes = _mm512_loadu_si512(bytes.as_ptr().cast());
            _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(1 << bit))
        }
    }

    #[inline(always)]
    fn select(mask: u64, nth: u32) -> u32 {
        Avx2::select(mask, nth)
    }

    #[inline(always)]
    fn prefetch(bytes: &[u8], at: usize) {
        Plain::prefetch(bytes, at);
    }

    #[inline(always)]
    fn prefetch_to(bytes: &[u8], at: usize) {
        Plain::prefetch_to(bytes, at);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::agrees;
    use super::*;

    proptest! {
        #[test]
        fn every_level_that_runs_here_is_right(bytes: [u8; 32], more: [u8; 32]) {
            agrees::<Plain>(bytes, more)?;
            if has!("avx2") && has!("bmi2") {
                agrees::<Avx2>(bytes, more)?;
            }
            if has!("avx512bw") && has!("bmi2") {
                agrees::<Avx512>(bytes, more)?;
            }
        }
    }
}
