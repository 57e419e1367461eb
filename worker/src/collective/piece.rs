//! A piece of an integer sum on the wire, narrowed to the bytes that its values need: exact, and fewer bytes to copy.

/// Sums per piece.
pub const PIECE: usize = 65_536;
/// Longest encoding of a piece.
pub const MAX_BYTES: usize = PIECE * 8 + 8;

/// Bytes that hold every one of `sums` in two's complement: 0 to 8.
#[inline]
fn width(sums: &[i64]) -> usize {
    // Folding the sign away leaves the magnitude's bits; or-ing keeps the longest.
    let bits = sums.iter().fold(0u64, |bits, &q| bits | (q ^ (q >> 63)) as u64);
    if bits == 0 && sums.iter().all(|&q| q == 0) {
        return 0;
    }
    (64 - bits.leading_zeros() as usize + 1).div_ceil(8)
}

/// Encodes `sums` into `wire`, which it clears first, and forgets them: width, then `width` bytes for each sum.
pub fn pack(sums: &mut [i64], wire: &mut Vec<u8>) {
    wire.clear();
    let width = width(sums);
    wire.push(width as u8);
    if width == 0 {
        return;
    }
    // Each store writes 8 bytes of which the next one overwrites all but `width`.
    wire.resize(1 + sums.len() * width + 8, 0);
    let body = &mut wire[1..];
    for (i, sum) in sums.iter_mut().enumerate() {
        body[i * width..][..8].copy_from_slice(&sum.to_le_bytes());
        *sum = 0;
    }
    wire.truncate(1 + sums.len() * width);
}

/// Adds `count` sums of `width` bytes each, encoded in `body`, to `sums`. `body` must have 8 bytes to spare at its end.
pub fn unpack_add(width: usize, body: &[u8], sums: &mut [i64]) {
    if width == 0 {
        return;
    }
    let unused = 64 - 8 * width as u32;
    for (i, sum) in sums.iter_mut().enumerate() {
        let word: [u8; 8] = body[i * width..][..8].try_into().expect("a slice of 8");
        *sum = sum.wrapping_add(i64::from_le_bytes(word) << unused >> unused);
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
            let (mut packed, mut wire) = (sums.clone(), vec![9u8; 3]);
            pack(&mut packed, &mut wire);
            prop_assert!(packed.iter().all(|&q| q == 0));
            let width = wire[0] as usize;
            prop_assert_eq!(wire.len(), 1 + width * sums.len());
            wire.extend([0xff; 8]);
            let mut total = vec![-5i64; sums.len()];
            unpack_add(width, &wire[1..], &mut total);
            prop_assert!(total.iter().zip(&sums).all(|(t, q)| *t == q.wrapping_sub(5)));
        }
    }

    #[test]
    fn the_width_is_the_least_that_fits() {
        for (sums, expected) in [
            (vec![0, 0], 0),
            (vec![0, -1], 1),
            (vec![127, -128], 1),
            (vec![128], 2),
            (vec![-129], 2),
            (vec![1 << 39], 6),
            (vec![(1 << 39) - 1, -(1 << 39)], 5),
            (vec![i64::MIN], 8),
        ] {
            assert_eq!(width(&sums), expected, "{sums:?}");
        }
    }
}
