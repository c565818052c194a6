//! How many workers there are, and on which CPU each runs.
//!
//! A worker that the scheduler moves loses its caches, and two workers on one CPU do the work of one. So each of several workers has
//! a CPU of its own. A single worker stays where the scheduler puts it, unless a CPU is named: on a production server nobody but its
//! administrator knows which CPU is free.

use anyhow::{Context, Result, bail};
use core_affinity::CoreId;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use replayer_common::maps::MAX_QUEUES;
use std::fs;
use std::path::Path;
use std::str::FromStr;

/// `--workers`: how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workers {
    /// As many as the CPUs, and the queues of the output interface, are good for.
    Auto,
    /// So many.
    Count(u32),
}

impl FromStr for Workers {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Workers> {
        if text == "auto" {
            return Ok(Workers::Auto);
        }
        match text.parse() {
            Ok(count) if (1..=MAX_QUEUES).contains(&count) => Ok(Workers::Count(count)),
            _ => bail!("'{text}': write a number from 1 to {MAX_QUEUES}, or auto"),
        }
    }
}

/// `--cpus`: CPU numbers as the kernel writes them, `0,2-4`, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(Vec<usize>);

impl FromStr for CpuList {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<CpuList> {
        let form = "write CPU numbers such as 2,3 or 4-7";
        let number = |text: &str| {
            text.parse::<u16>()
                .map(usize::from)
                .with_context(|| format!("'{text}' is not a CPU number; {form}"))
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                bail!("'{part}': the last CPU is before the first; {form}");
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    bail!("CPU {cpu} is named twice; each worker needs one of its own");
                }
                cpus.push(cpu);
            }
        }
        Ok(CpuList(cpus))
    }
}

/// Where the kernel tells of CPUs (Documentation/ABI/stable/sysfs-devices-node).
const CPUS: &str = "/sys/devices/system/cpu";

/// Keeps the calling thread to the CPUs of the memory node that `cpu` is of, as far as it may use them. Where there are no nodes, or there is
/// only one, nothing changes.
pub fn stay_near(cpu: usize) {
    let Some(CpuList(near)) = node_of(Path::new(CPUS), cpu) else { return };
    let this_thread = Pid::from_raw(0);
    let (Ok(allowed), mut chosen) = (sched_getaffinity(this_thread), CpuSet::new()) else { return };
    for cpu in near {
        if allowed.is_set(cpu) == Ok(true) {
            // It is one that the set has room for: the other one has.
            let _ = chosen.set(cpu);
        }
    }
    if let Err(error) = sched_setaffinity(this_thread, &chosen) {
        log::debug!("a thread stays where it is instead of near CPU {cpu}: {error}");
    }
}

/// The CPUs of the node that a CPU is of; `None` where the kernel knows of no nodes.
fn node_of(cpus: &Path, cpu: usize) -> Option<CpuList> {
    let mut entries = fs::read_dir(cpus.join(format!("cpu{cpu}"))).ok()?.flatten();
    // `node1`, a link to the node.
    let node = entries.find(|entry| {
        let number =
            entry.file_name().to_str().and_then(|name| name.strip_prefix("node")?.parse::<u32>().ok());
        number.is_some()
    })?;
    fs::read_to_string(node.path().join("cpulist")).ok()?.trim().parse().ok()
}

/// What was asked for and what the CPUs allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Workers to be made.
    pub workers: u32,
    /// Whether fewer will do when the output interface has fewer queues.
    pub fewer_will_do: bool,
    /// The CPU of each worker; empty: the scheduler's choice.
    cpus: Vec<CoreId>,
}

impl Placement {
    /// Decides for the CPUs that this process may use.
    ///
    /// # Errors
    /// When `--cpus` names one that it may not use, or more or fewer than there are workers.
    pub fn choose(workers: Option<Workers>, cpus: Option<&CpuList>) -> Result<Placement> {
        let usable = core_affinity::get_core_ids().context("look up the CPUs that this process may use")?;
        decide(workers, cpus, &usable)
    }

    /// The CPU that a worker is to be bound to.
    pub fn cpu(&self, worker: u32) -> Option<CoreId> {
        self.cpus.get(worker as usize).copied()
    }
}

fn decide(workers: Option<Workers>, cpus: Option<&CpuList>, usable: &[CoreId]) -> Result<Placement> {
    let names = || usable.iter().map(|cpu| cpu.id.to_string()).collect::<Vec<_>>().join(",");
    if let Some(CpuList(list)) = cpus {
        if let Some(cpu) = list.iter().find(|&&cpu| usable.iter().all(|usable| usable.id != cpu)) {
            bail!("--cpus: this process may not use CPU {cpu}; it may use {}", names());
        }
        if list.len() > MAX_QUEUES as usize {
            bail!("--cpus names {} CPUs; at most {MAX_QUEUES} workers are possible", list.len());
        }
        let count = list.len() as u32;
        if let Some(Workers::Count(workers)) = workers
            && workers != count
        {
            bail!(
                "--cpus names {count} CPUs for {workers} workers; name one for each, or leave --workers out"
            );
        }
        let cpus = list.iter().map(|&id| CoreId { id }).collect();
        return Ok(Placement { workers: count, fewer_will_do: workers == Some(Workers::Auto), cpus });
    }
    let (count, fewer_will_do) = match workers {
        None => (1, false),
        Some(Workers::Count(count)) => (count, false),
        // The other half is the production server's.
        Some(Workers::Auto) => ((usable.len() as u32 / 2).clamp(1, MAX_QUEUES), true),
    };
    if count as usize > usable.len() {
        bail!(
            "--workers {count}: this process may use {} CPUs ({}); use at most that many workers",
            usable.len(),
            names()
        );
    }
    // From the last one down: interrupts that nobody has distributed are at the first.
    let cpus = usable.iter().rev().copied().take(if count > 1 { count as usize } else { 0 }).collect();
    Ok(Placement { workers: count, fewer_will_do, cpus })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_of_a_cpu_as_the_kernel_tells_it() {
        let cpus = std::env::temp_dir().join(format!("replayer-cpus-{}", std::process::id()));
        for (cpu, files) in
            [("cpu3", ["node1", "nodes", "cpufreq"]), ("cpu0", ["cpufreq", "topology", "power"])]
        {
            for file in files {
                fs::create_dir_all(cpus.join(cpu).join(file)).unwrap();
                fs::write(cpus.join(cpu).join(file).join("cpulist"), "2-3,6\n").unwrap();
            }
        }
        assert_eq!(node_of(&cpus, 3), Some(CpuList(vec![2, 3, 6])));
        assert_eq!((node_of(&cpus, 0), node_of(&cpus, 1)), (None, None));
        fs::remove_dir_all(cpus).unwrap();
    }

    #[test]
    fn a_thread_near_a_cpu_may_use_that_cpu_and_none_that_it_might_not_before() {
        let of_thread = || sched_getaffinity(Pid::from_raw(0)).unwrap();
        let before = of_thread();
        let all: Vec<usize> = (0..CpuSet::count()).filter(|&cpu| before.is_set(cpu).unwrap()).collect();
        let (&first, &last) = (all.first().unwrap(), all.last().unwrap());
        let mut only = CpuSet::new();
        only.set(last).unwrap();
        std::thread::spawn(move || {
            stay_near(first);
            let now = of_thread();
            assert!(now.is_set(first).unwrap());
            assert!((0..CpuSet::count()).all(|cpu| !now.is_set(cpu).unwrap() || all.contains(&cpu)));
            sched_setaffinity(Pid::from_raw(0), &only).unwrap();
            stay_near(last);
            assert_eq!(of_thread(), only);
        })
        .join()
        .unwrap();
    }

    fn four() -> Vec<CoreId> {
        (0..4).map(|id| CoreId { id }).collect()
    }

    fn placed(workers: Option<&str>, cpus: Option<&str>) -> Result<(u32, bool, Vec<usize>)> {
        let workers = workers.map(Workers::from_str).transpose()?;
        let cpus = cpus.map(CpuList::from_str).transpose()?;
        let placement = decide(workers, cpus.as_ref(), &four())?;
        let cpus = (0..placement.workers).filter_map(|worker| Some(placement.cpu(worker)?.id)).collect();
        Ok((placement.workers, placement.fewer_will_do, cpus))
    }

    #[test]
    fn several_workers_have_a_cpu_each() {
        assert_eq!(placed(None, None).unwrap(), (1, false, vec![]));
        assert_eq!(placed(Some("1"), None).unwrap(), (1, false, vec![]));
        assert_eq!(placed(Some("3"), None).unwrap(), (3, false, vec![3, 2, 1]));
        assert_eq!(placed(Some("auto"), None).unwrap(), (2, true, vec![3, 2]));
        assert_eq!(placed(None, Some("1")).unwrap(), (1, false, vec![1]));
        assert_eq!(placed(None, Some("3,0-1")).unwrap(), (3, false, vec![3, 0, 1]));
        assert_eq!(placed(Some("auto"), Some("0,2")).unwrap(), (2, true, vec![0, 2]));
        assert_eq!(placed(Some("2"), Some("0,2")).unwrap(), (2, false, vec![0, 2]));
    }

    #[test]
    fn b009_impossible_placements_say_what_is_possible() {
        for (workers, cpus, says) in [
            (Some("0"), None, "1 to 256"),
            (Some("many"), None, "or auto"),
            (Some("5"), None, "at most that many"),
            (Some("3"), Some("0,1"), "one for each"),
            (None, Some("7"), "0,1,2,3"),
            (None, Some("2,1-2"), "named twice"),
            (None, Some("3-1"), "before the first"),
            (None, Some("x"), "write CPU numbers"),
        ] {
            let error = format!("{:#}", placed(workers, cpus).unwrap_err());
            assert!(error.contains(says), "{workers:?} {cpus:?}: {error}");
        }
    }
}
