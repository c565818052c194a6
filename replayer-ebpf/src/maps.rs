//! The maps. Layouts, limits and meanings are in `replayer_common::maps`; a static's name is the map's name.

use aya_ebpf::btf_maps::{ArrayOfMaps, RingBuf};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, XskMap};
use replayer_common::addr::Ip;
use replayer_common::counters::{CaptureVerdict, MirrorVerdict, ResponsesVerdict, RingVerdict, SpanVerdict};
use replayer_common::maps::{
    CaptureConfig, HANDSHAKE_SLOTS, MAX_CLIENT_NETS, MAX_LOCAL_ADDRESSES, MAX_QUEUES, MAX_SERVICES,
    PORT_WORDS, ServiceKey, port_bit,
};

#[map]
pub static SERVICES: HashMap<ServiceKey, u32> = HashMap::with_max_entries(2 * MAX_SERVICES, 0);
#[map]
pub static PORTS: Array<u64> = Array::with_max_entries(PORT_WORDS, 0);
#[map]
pub static CONFIG: Array<CaptureConfig> = Array::with_max_entries(1, 0);
#[map]
pub static CLIENTS: LpmTrie<Ip, u32> = LpmTrie::with_max_entries(MAX_CLIENT_NETS + 2, 0);
#[map]
pub static HANDSHAKES: Array<u32> = Array::with_max_entries(HANDSHAKE_SLOTS, 0);
/// The rings are made by user space, as large as it wants; the smallest one stands for them here.
#[btf_map]
pub static RINGS: ArrayOfMaps<Ring, { MAX_QUEUES as usize }> = ArrayOfMaps::new();
#[map]
pub static SLEEPING: Array<u64> = Array::with_max_entries(MAX_QUEUES, 0);
#[map]
pub static XSKS: XskMap = XskMap::with_max_entries(MAX_QUEUES, 0);
#[map]
pub static LOCAL_ADDRESSES: HashMap<Ip, u32> = HashMap::with_max_entries(MAX_LOCAL_ADDRESSES, 0);
#[map]
pub static MIRROR_COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(MirrorVerdict::ALL.len() as u32, 0);
#[map]
pub static RING_COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(RingVerdict::ALL.len() as u32, 0);
#[map]
pub static SPAN_COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(SpanVerdict::ALL.len() as u32, 0);
#[map]
pub static CAPTURE_COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(CaptureVerdict::ALL.len() as u32, 0);
#[map]
pub static RESPONSES_COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(ResponsesVerdict::ALL.len() as u32, 0);

/// A ring of records.
pub type Ring = RingBuf<u8, 4096>;

/// Moves one counter of the running CPU.
#[inline(always)]
pub fn count(counters: &PerCpuArray<u64>, index: u32) {
    if let Some(counter) = counters.get_ptr_mut(index) {
        // SAFETY: the kernel's pointer to this CPU's value; the programs run with preemption or migration off, and not
        // nested on one interface, so that nobody else writes it meanwhile.
        unsafe { *counter += 1 };
    }
}

/// Whether any service has `port`.
#[inline(always)]
pub fn is_service_port(port: u16) -> bool {
    let (word, mask) = port_bit(port);
    PORTS.get(word).is_some_and(|bits| bits & mask != 0)
}

/// Whether `key` is one of the services.
#[inline(always)]
pub fn is_service(key: &ServiceKey) -> bool {
    SERVICES.get_ptr(key).is_some()
}

/// Whether the longest prefix that `client` is in was chosen.
#[inline(always)]
pub fn is_chosen(client: &Ip) -> bool {
    CLIENTS.get(Key::new(8 * size_of::<Ip>() as u32, *client)).is_some_and(|chosen| *chosen != 0)
}
