//! The flow hash: the same in the kernel and in user space, on every host and in every run.
//!
//! It decides two things: which sessions a sample keeps (so that every host samples the same ones) and which worker a
//! session lives in. It is not a defence: tables that hostile traffic fills take a random `seed`.

use crate::addr::Ip;

/// The seed that sampling and sharding use: fixed, so that the same client is chosen everywhere.
pub const FLOW_SEED: u64 = 0x52_65_70_6c_61_79_65_72;

/// One round: multiply, then fold the high half back (the finaliser of MurmurHash3, public domain, A. Appleby).
#[inline(always)]
fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

#[inline(always)]
fn halves(ip: &Ip) -> (u64, u64) {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *ip;
    (u64::from_be_bytes([a, b, c, d, e, f, g, h]), u64::from_be_bytes([i, j, k, l, m, n, o, p]))
}

/// The hash of a client's address and port.
#[inline(always)]
pub fn flow_hash(seed: u64, ip: &Ip, port: u16) -> u32 {
    let (high, low) = halves(ip);
    let h = mix(seed ^ low ^ ((port as u64) << 48)).wrapping_add(high.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mix(h) as u32
}

/// The hash of both ends of a connection, for tables.
#[inline(always)]
pub fn pair_hash(seed: u64, a: &Ip, a_port: u16, b: &Ip, b_port: u16) -> u32 {
    hash_of_halves(seed, halves(a), a_port, halves(b), b_port)
}

/// The same of IPv4 addresses, their bytes as they are in memory.
#[inline(always)]
pub fn pair_hash_v4(seed: u64, a: u32, a_port: u16, b: u32, b_port: u16) -> u32 {
    let halves = |v4: u32| (0, 0xffff_0000_0000 | u64::from(u32::from_be(v4)));
    hash_of_halves(seed, halves(a), a_port, halves(b), b_port)
}

#[inline(always)]
fn hash_of_halves(
    seed: u64,
    (a_high, a_low): (u64, u64),
    a_port: u16,
    (b_high, b_low): (u64, u64),
    b_port: u16,
) -> u32 {
    // Rounds of wyhash (public domain, Wang Yi): the halves of a product of 128 bits, folded.
    let folded = |x: u64, y: u64| {
        let product = u128::from(x) * u128::from(y);
        product as u64 ^ (product >> 64) as u64
    };
    let lows = a_low ^ b_low.rotate_left(32);
    // Two rounds more for IPv6: who may choose all of an address could make its halves and the ports cancel each other out.
    let highs = if a_high | b_high == 0 {
        0
    } else {
        let both = folded(a_high ^ seed, b_high ^ seed.rotate_left(32) ^ 0x8ebc_6af0_9c88_c6e3);
        folded(both ^ b_low, seed ^ 0x5899_65cc_7537_4cc3)
    };
    let ports = ((a_port as u64) << 32) | b_port as u64;
    let h = folded(lows ^ seed, highs ^ ports ^ seed.rotate_left(32) ^ 0xa076_1d64_78bd_642f);
    folded(h, 0xe703_7ed1_a0b4_28db) as u32
}

/// The threshold below which a flow hash belongs to a sample of `percent`.
pub fn sample_threshold(percent: f64) -> u64 {
    // 2^32 values; a u64, so that 100 % includes the highest hash.
    (percent.clamp(0.0, 100.0) / 100.0 * 4_294_967_296.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::from_v4;

    #[test]
    fn b044_a_sample_keeps_its_share() {
        let threshold = sample_threshold(20.0);
        let mut kept = 0;
        for client in 0..100u8 {
            for port in 20_000..20_500 {
                kept += u32::from(
                    u64::from(flow_hash(FLOW_SEED, &from_v4([10, 0, 0, client]), port)) < threshold,
                );
            }
        }
        assert!((9_500..10_500).contains(&kept), "{kept} of 50000 at 20 %");
    }

    #[test]
    fn ipv4_addresses_hash_as_what_they_are_mapped_to() {
        let (a, b) = ([192, 0, 2, 7], [10, 255, 0, 1]);
        let expected = pair_hash(9, &from_v4(a), 40_000, &from_v4(b), 80);
        assert_eq!(pair_hash_v4(9, u32::from_ne_bytes(a), 40_000, u32::from_ne_bytes(b), 80), expected);
    }

    #[test]
    fn neighbours_spread_over_tables() {
        // Clients as they come: a few addresses with many ports, many addresses, and both, to one server.
        for (seed, ports) in [(0, 1), (1, 60_000), (0x1234_5678_9abc_def0, 16), (u64::MAX, 256)] {
            let mut slots = [0u8; 1 << 16];
            for i in 0..1u32 << 16 {
                let [a, b, c, d] = (i / ports).to_be_bytes();
                let (client, port) = (from_v4([10 ^ a, b, c, d]), 1024 + (i % ports) as u16);
                let hash = pair_hash(seed, &client, port, &from_v4([192, 0, 2, 1]), 80);
                slots[hash as usize % slots.len()] += 1;
            }
            // As many as slots: 1 / e of them stay empty by chance, and no slot has many.
            let empty = slots.iter().filter(|&&n| n == 0).count();
            assert!((23_500..24_700).contains(&empty), "{empty} empty of 65536, seed {seed}, {ports} ports");
            assert!(slots.iter().all(|&n| n < 12), "seed {seed}, {ports} ports");
        }
    }

    #[test]
    fn who_knows_the_hash_but_not_the_seed_makes_no_collisions() {
        // A client's prefix and its port, or its and the server's interface identifier, that cancel each other out where they are only added up.
        let inverse =
            |odd: u64| (0..6).fold(odd, |x, _| x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x))));
        let high = |high: u64, low: u64| {
            let mut ip = [0; 16];
            ip[..8].copy_from_slice(&high.to_be_bytes());
            ip[8..].copy_from_slice(&low.to_be_bytes());
            ip
        };
        let server = high(0x2001_0db8_0000_0000, 1);
        let to_cancel = inverse(0x9e37_79b9_7f4a_7c15);
        for seed in [1, 0x1234_5678_9abc_def0] {
            let by_port: [u32; 4096] = core::array::from_fn(|port| {
                let prefix = to_cancel.wrapping_mul((port as u64) << 32);
                pair_hash(seed, &high(prefix, 7), port as u16, &server, 80)
            });
            let by_server: [u32; 4096] = core::array::from_fn(|i| {
                let (client, server) = (high(1 << 61, (i as u64).rotate_left(32)), high(1 << 61, i as u64));
                pair_hash(seed, &client, 40_000, &server, 80)
            });
            for mut hashes in [by_port, by_server] {
                hashes.sort_unstable();
                let different = 1 + hashes.windows(2).filter(|pair| pair[0] != pair[1]).count();
                assert!(different > 4090, "{different} hashes of 4096 pairs, seed {seed}");
            }
        }
    }

    #[test]
    fn consecutive_ports_spread_over_shards() {
        let mut shards = [0u32; 8];
        for port in 30_000..38_000 {
            shards[(flow_hash(FLOW_SEED, &from_v4([192, 0, 2, 7]), port) % 8) as usize] += 1;
        }
        assert!(shards.iter().all(|&n| (850..1150).contains(&n)), "{shards:?}");
    }
}
