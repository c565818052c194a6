//! What a role needs the rights for, checked before anything is touched, so that a missing one is named and not guessed.

use anyhow::{Result, bail};
use std::fs;

/// Bits of the capability sets (include/uapi/linux/capability.h).
const NEEDED: [(u32, &str); 5] =
    [(12, "CAP_NET_ADMIN"), (13, "CAP_NET_RAW"), (21, "CAP_SYS_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];

/// Checks the effective capabilities of this process.
///
/// # Errors
/// Names what is missing and how to get it.
pub fn check() -> Result<()> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).map(str::trim);
    // Without /proc the kernel will have the word.
    let Some(bits) = effective.and_then(|hex| u64::from_str_radix(hex, 16).ok()) else { return Ok(()) };
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(bit, _)| bits & (1 << bit) == 0).map(|&(_, name)| name).collect();
    if !missing.is_empty() {
        bail!(
            "no permission: this process lacks {}; run it as root, for example with sudo",
            missing.join(", ")
        );
    }
    Ok(())
}
