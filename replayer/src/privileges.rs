//! What a role needs the rights for: checked before anything is touched, so that a missing one is named and not guessed, and given up when
//! everything stands. Rights belong to threads: those that look at captured bytes keep none.

use anyhow::{Result, bail};
use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::geteuid;
use std::io::{self, ErrorKind};
use std::path::Path;

/// Devices, sockets and programs.
const NEEDED: [Capability; 5] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_RAW,
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_PERFMON,
    Capability::CAP_BPF,
];

/// What a thread goes on to do when everything stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Move packets: descriptors are enough.
    Nothing,
    /// Read capture files, whoever they belong to.
    Reading,
    /// Write files wherever they were asked for.
    Writing,
    /// Ask for neighbours (see [`crate::net::neighbour`]).
    Network,
    /// Take devices down at the end, and write the report.
    Main,
}

impl Keep {
    fn capabilities(self) -> &'static [Capability] {
        match self {
            Keep::Nothing => &[],
            Keep::Reading => &[Capability::CAP_DAC_READ_SEARCH],
            Keep::Writing => &[Capability::CAP_DAC_OVERRIDE],
            Keep::Network => &[Capability::CAP_NET_ADMIN],
            Keep::Main => &[Capability::CAP_NET_ADMIN, Capability::CAP_DAC_OVERRIDE],
        }
    }
}

/// Checks the effective capabilities of this process.
///
/// # Errors
/// Names what is missing and how to get it.
pub fn check() -> Result<()> {
    // Where they cannot be read, the kernel will have the word.
    let Ok(effective) = caps::read(None, CapSet::Effective) else { return Ok(()) };
    let missing: Vec<String> =
        NEEDED.iter().filter(|needed| !effective.contains(needed)).map(ToString::to_string).collect();
    if !missing.is_empty() {
        bail!(
            "no permission: this process lacks {}; run it as root, for example with sudo",
            missing.join(", ")
        );
    }
    Ok(())
}

/// Gives up all capabilities of the calling thread, and of the threads that it starts from here on, but those that it had and keeps.
pub fn drop_all_but(keep: Keep) {
    let dropped = caps::read(None, CapSet::Permitted).and_then(|permitted| {
        let kept: CapsHashSet =
            keep.capabilities().iter().filter(|kept| permitted.contains(kept)).copied().collect();
        // In this order: none may be effective or ambient that is not permitted.
        for set in [CapSet::Ambient, CapSet::Inheritable] {
            caps::clear(None, set)?;
        }
        caps::set(None, CapSet::Effective, &kept)?;
        caps::set(None, CapSet::Permitted, &kept)
    });
    if let Err(error) = dropped {
        log::warn!("a thread goes on with rights that it does not need: {error}");
    }
}

/// What to do about a file that this process was not let at, for the end of a message; nothing for other errors.
pub fn remedy(path: &Path, error: &io::Error) -> String {
    if error.kind() != ErrorKind::PermissionDenied {
        return String::new();
    }
    let user = geteuid();
    // Root is let at everything, as long as it has its rights.
    let why = if user.is_root() {
        ": a role that runs has given up root's right to the files of others"
    } else {
        ""
    };
    // Of a directory nobody should be told to give it away.
    let remedy = if path.is_file() {
        format!("`chown {user} {}` lets it", path.display())
    } else {
        "Name a file in a directory that is this user's".to_owned()
    };
    format!("; user {user} may not{why}. {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b067_a_thread_gives_up_its_rights_and_no_other_does() {
        let mine = || caps::read(None, CapSet::Permitted).unwrap();
        let before = mine();
        for keep in [Keep::Main, Keep::Nothing] {
            let had = before.clone();
            std::thread::spawn(move || {
                drop_all_but(keep);
                let allowed: CapsHashSet = keep.capabilities().iter().copied().collect();
                for set in [CapSet::Effective, CapSet::Permitted] {
                    assert_eq!(caps::read(None, set).unwrap(), &allowed & &had);
                }
            })
            .join()
            .unwrap();
        }
        assert_eq!(mine(), before);
    }
}
