//! A piece of an integer sum on the wire, narrowed to the bytes that its values need: exact, and fewer bytes to copy.
//! A piece is its width and then two planes: the low halves of all sums, and what their high halves need.

use crate::ops::simd::vectorised;

/// Sums per piece.
pub const PIECE: usize = 65_536;
/// Longest encoding of a piece without its width.
pub const MAX_BYTES: usize = PIECE * 8;

/// The least of 0, 2, 4, 5, 6 and 8 bytes that holds every one of `sums` in two's complement.
#[inline(always)]
fn width_of(sums: &[i64]) -> usize {
    // Folding the sign away leaves the magnitude's bits; or-ing keeps the longest.
    let (folded, any) = sums.iter().fold((0, 0), |(folded, any), &q| (folded | (q ^ (q >> 63)), any | q));
    match 64 - folded.leading_zeros() + 1 {
        _ if any == 0 => 0,
        ..=16 => 2,
        17..=32 => 4,
        33..=40 => 5,
        41..=48 => 6,
        _ => 8,
    }
}

vectorised! { fn width(sums: &[i64]) -> usize { width_of(sums) } }

vectorised! {
    /// Adds sums to sums.
    pub fn add(sums: &mut [i64], more: &[i64]) {
        sums.iter_mut().zip(more).for_each(|(q, more)| *q = q.wrapping_add(*more));
    }
}

/// Bytes of the two planes of one sum.
fn planes(width: usize) -> Option<(usize, usize)> {
    match width {
        0 => Some((0, 0)),
        2 => Some((2, 0)),
        4 => Some((4, 0)),
        5 => Some((4, 1)),
        6 => Some((4, 2)),
        8 => Some((4, 4)),
        _ => None,
    }
}

/// Encodes `sums` into `wire`, which it clears first: width, then `width` bytes for each sum.
pub fn pack(sums: &[i64], wire: &mut Vec<u8>) {
    let width = width(sums);
    wire.resize(1 + sums.len() * width, 0);
    wire[0] = width as u8;
    let (low, high) = wire[1..].split_at_mut(sums.len() * width.min(4));
    match width {
        0 => {}
        2 => pack_low::<2>(sums, low),
        4 => pack_low::<4>(sums, low),
        5 => pack_both::<1>(sums, low, high),
        6 => pack_both::<2>(sums, low, high),
        _ => pack_both::<4>(sums, low, high),
    }
}

/// Adds the sums encoded in `body`, `width` bytes each, to `sums`; `None` where nothing is ever encoded like that.
pub fn unpack_add(width: usize, body: &[u8], sums: &mut [i64]) -> Option<()> {
    let (low, high) = planes(width)?;
    let (low, high) = (body.get(..low * sums.len())?, body.get(low * sums.len()..(low + high) * sums.len())?);
    match width {
        0 => {}
        2 => add_low::<2>(sums, low),
        4 => add_low::<4>(sums, low),
        5 => add_both::<1>(sums, low, high),
        6 => add_both::<2>(sums, low, high),
        _ => add_both::<4>(sums, low, high),
    }
    Some(())
}

macro_rules! by_width {
    ($($name:ident<$w:ident>($($arg:ident: $type:ty),*) = $body:ident;)*) => {$(
        fn $name<const $w: usize>($($arg: $type),*) {
            vectorised! { fn one($($arg: $type),*) { $body::<1>($($arg),*) } }
            vectorised! { fn two($($arg: $type),*) { $body::<2>($($arg),*) } }
            vectorised! { fn four($($arg: $type),*) { $body::<4>($($arg),*) } }
            match $w {
                1 => one($($arg),*),
                2 => two($($arg),*),
                _ => four($($arg),*),
            }
        }
    )*};
}

by_width! {
    pack_low<W>(sums: &[i64], low: &mut [u8]) = pack_low_plain;
    pack_both<W>(sums: &[i64], low: &mut [u8], high: &mut [u8]) = pack_both_plain;
    add_low<W>(sums: &mut [i64], low: &[u8]) = add_low_plain;
    add_both<W>(sums: &mut [i64], low: &[u8], high: &[u8]) = add_both_plain;
}

/// The lowest `W` bytes.
#[inline(always)]
fn low_bytes<const W: usize>(q: i64) -> [u8; W] {
    std::array::from_fn(|i| (q >> (8 * i)) as u8)
}

/// Two's complement of `W` bytes.
#[inline(always)]
fn signed<const W: usize>(bytes: [u8; W]) -> i64 {
    let word = bytes.iter().enumerate().fold(0u64, |word, (i, &byte)| word | u64::from(byte) << (8 * i));
    let unused = 64 - 8 * W as u32;
    (word << unused) as i64 >> unused
}

#[inline(always)]
fn pack_low_plain<const W: usize>(sums: &[i64], low: &mut [u8]) {
    for (&q, low) in sums.iter().zip(low.as_chunks_mut::<W>().0) {
        *low = low_bytes(q);
    }
}

#[inline(always)]
fn pack_both_plain<const W: usize>(sums: &[i64], low: &mut [u8], high: &mut [u8]) {
    for ((&q, low), high) in sums.iter().zip(low.as_chunks_mut::<4>().0).zip(high.as_chunks_mut::<W>().0) {
        *low = low_bytes(q);
        *high = low_bytes(q >> 32);
    }
}

#[inline(always)]
fn add_low_plain<const W: usize>(sums: &mut [i64], low: &[u8]) {
    for (q, &low) in sums.iter_mut().zip(low.as_chunks::<W>().0) {
        *q = q.wrapping_add(signed(low));
    }
}

#[inline(always)]
fn add_both_plain<const W: usize>(sums: &mut [i64], low: &[u8], high: &[u8]) {
    for ((q, &low), &high) in sums.iter_mut().zip(low.as_chunks::<4>().0).zip(high.as_chunks::<W>().0) {
        *q = q.wrapping_add(signed(high) << 32 | i64::from(u32::from_le_bytes(low)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpacking_adds_what_was_packed(
            sums in (0u32..64).prop_flat_map(|shift| prop::collection::vec(any::<i64>().prop_map(move |q| q >> shift), 1..50)),
        ) {
            let mut wire = vec![9u8; 3];
            pack(&sums, &mut wire);
            let width = wire[0] as usize;
            prop_assert_eq!(wire.len(), 1 + width * sums.len());
            let mut total = vec![-5i64; sums.len()];
            unpack_add(width, &wire[1..], &mut total).unwrap();
            prop_assert!(total.iter().zip(&sums).all(|(t, q)| *t == q.wrapping_sub(5)));
        }
    }

    #[test]
    fn what_nobody_packs_is_refused() {
        assert!(unpack_add(3, &[0; 24], &mut [0; 8]).is_none());
        assert!(unpack_add(4, &[0; 31], &mut [0; 8]).is_none());
    }

    #[test]
    fn the_width_is_the_least_that_fits() {
        for (sums, expected) in [
            (vec![0, 0], 0),
            (vec![0, -1], 2),
            (vec![(1 << 15) - 1, -(1 << 15)], 2),
            (vec![1 << 15], 4),
            (vec![-(1 << 31)], 4),
            (vec![1 << 31], 5),
            (vec![(1 << 39) - 1, -(1 << 39)], 5),
            (vec![1 << 39], 6),
            (vec![-(1 << 47) - 1], 8),
            (vec![i64::MIN], 8),
        ] {
            assert_eq!(width(&sums), expected, "{sums:?}");
        }
    }
}
