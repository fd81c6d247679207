//! The Linux kernel's jhash (`include/linux/jhash.h`, Bob Jenkins' lookup3), bit for bit, so that the kernel and the
//! agent choose the same endpoint for a flow. Words are read in little-endian order, as on a little-endian kernel.

const START: u32 = 0xdead_beef;

/// The hash of `key` with `seed`.
#[must_use]
pub fn jhash(key: &[u8], seed: u32) -> u32 {
    // The kernel keeps lengths in 32 bits; the longest key here has 44 bytes.
    let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
    let mut state = [START.wrapping_add(length).wrapping_add(seed); 3];
    let mut rest = key;
    while rest.len() > 12
        && let Some((block, behind)) = rest.split_first_chunk::<12>()
    {
        add(&mut state, *block);
        mix(&mut state);
        rest = behind;
    }
    if !rest.is_empty() {
        let mut block = [0; 12];
        block.iter_mut().zip(rest).for_each(|(target, byte)| *target = *byte);
        add(&mut state, block);
        finish(&mut state);
    }
    state[2]
}

/// Maps a hash to one of `size` slots, as nf_tables does (`reciprocal_scale`).
#[must_use]
pub fn slot_of(hash: u32, size: u32) -> u32 {
    u32::try_from((u64::from(hash) * u64::from(size)) >> 32).unwrap_or(0)
}

fn add([a, b, c]: &mut [u32; 3], block: [u8; 12]) {
    let [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3] = block;
    *a = a.wrapping_add(u32::from_le_bytes([a0, a1, a2, a3]));
    *b = b.wrapping_add(u32::from_le_bytes([b0, b1, b2, b3]));
    *c = c.wrapping_add(u32::from_le_bytes([c0, c1, c2, c3]));
}

fn mix(state: &mut [u32; 3]) {
    let [mut a, mut b, mut c] = *state;
    for (first, second, third) in [(4, 6, 8), (16, 19, 4)] {
        a = a.wrapping_sub(c) ^ c.rotate_left(first);
        c = c.wrapping_add(b);
        b = b.wrapping_sub(a) ^ a.rotate_left(second);
        a = a.wrapping_add(c);
        c = c.wrapping_sub(b) ^ b.rotate_left(third);
        b = b.wrapping_add(a);
    }
    *state = [a, b, c];
}

fn finish(state: &mut [u32; 3]) {
    let [mut a, mut b, mut c] = *state;
    c = (c ^ b).wrapping_sub(b.rotate_left(14));
    a = (a ^ c).wrapping_sub(c.rotate_left(11));
    b = (b ^ a).wrapping_sub(a.rotate_left(25));
    c = (c ^ b).wrapping_sub(b.rotate_left(16));
    a = (a ^ c).wrapping_sub(c.rotate_left(4));
    b = (b ^ a).wrapping_sub(a.rotate_left(14));
    c = (c ^ b).wrapping_sub(b.rotate_left(24));
    *state = [a, b, c];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_equal_those_of_lookup3() {
        // Computed with another implementation that was compared with a running kernel.
        let counting: Vec<u8> = (0..40).collect();
        let check = |key: &[u8], seed, hash: u32| assert_eq!(jhash(key, seed), hash, "{key:?}");
        check(b"", 0, 3_735_928_559);
        check(b"xxxxxxxxxxxx", 1, 4_045_260_966);
        check(&counting[..13], 7, 1_648_600_050);
        check(&counting, 7, 1_652_560_766);
    }

    #[test]
    fn slots_are_all_below_the_size() {
        assert_eq!(slot_of(0, 65_537), 0);
        assert_eq!(slot_of(u32::MAX, 65_537), 65_536);
        assert_eq!(slot_of(u32::MAX / 2 + 1, 100), 50);
    }
}
