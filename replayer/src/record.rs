//! `replayer record`: writes what a live capture would replay to capture files, to be replayed later.
//!
//! The capture is the online role's ([`crate::capture`]): requests of clients to the services, whole packets, and nothing else. Files are
//! pcapng with nanoseconds; one follows the other when it is large or old enough, and the oldest goes when there are too many. A file that
//! is being written has `.part` at the end of its name, so that whoever takes files away takes whole ones.

use crate::afxdp::{Port, PortConfig, Received};
use crate::capture::choice::{self, Facts};
use crate::capture::ring::Reader;
use crate::capture::{Backend, Capture, CaptureArg, Source, Verdicts};
use crate::cli::values::{online_endpoint, protocol_of};
use crate::cli::{PercentArg, Role};
use crate::clients::ClientArgs;
use crate::clock;
use crate::configuration::{ConfigArg, Configuration};
use crate::net::{Device, NetError, Network};
use crate::pcap::writer::NgWriter;
use crate::privileges::{self, Keep};
use crate::report;
use crate::say::{self, say};
use crate::signals::{Asked, Signals};
use anyhow::{Context, Result, bail};
use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use replayer_common::addr::{ANY, Endpoint};
use replayer_common::hash::sample_threshold;
use replayer_common::packet::Protocol;
use serde::Serialize;
use std::collections::{BTreeSet, VecDeque};
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime};

/// Frames of the port, half of them for packets that wait to be written: 128 MiB.
const FRAMES: u32 = 65_536;
/// An Ethernet header with two VLAN tags.
const ETHERNET_HEADER: u32 = 22;
/// Packets taken at once.
const BATCH: usize = 64;
/// How often it is looked whether something has come, while that is often.
const BUSY_INTERVAL: Duration = Duration::from_millis(1);
/// How often limits of time are looked at while nothing comes.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Arguments of `replayer record`.
#[derive(Debug, Args)]
pub struct RecordArgs {
    /// A file with more of them.
    #[command(flatten)]
    pub config: ConfigArg,

    /// What to record: requests to these ports, or to a port of one address; udp: before it for UDP.
    #[arg(
        short = 'x',
        long = "service",
        value_name = "[udp:][IP:]PORT",
        required = true,
        value_delimiter = ','
    )]
    pub services: Vec<RecordedArg>,

    /// Capture on this interface.
    #[arg(short = 'i', long = "interface", value_name = "IFACE")]
    pub interface: String,

    /// How they are taken off the wire.
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub capture: CaptureArg,

    /// Where the files go: PREFIX-00001.pcapng and so on.
    #[arg(short = 'w', long = "write", value_name = "PREFIX")]
    pub prefix: PathBuf,

    /// Begin another file after so many MB.
    #[arg(long, value_name = "MB", default_value_t = 1000.0)]
    pub file_size: f64,

    /// Begin another file after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub file_seconds: Option<f64>,

    /// Keep the newest files only, so many.
    #[arg(long, value_name = "COUNT")]
    pub files: Option<usize>,

    /// End after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub duration: Option<f64>,

    /// End after so many packets.
    #[arg(long, value_name = "COUNT")]
    pub packets: Option<u64>,

    /// Whose requests.
    #[command(flatten)]
    pub whose: ClientArgs,

    /// Share of connections to record; always the same ones.
    #[arg(short = 'r', long = "sample", value_name = "PERCENT", default_value = "100")]
    pub sample: PercentArg,

    /// Write all counters to this file as JSON at the end.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// `-x` of `record`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedArg {
    /// Its transport protocol.
    pub protocol: Protocol,
    /// Its address, or any, and its port.
    pub online: Endpoint,
}

impl FromStr for RecordedArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<RecordedArg> {
        let form = "write [udp:][IP:]PORT, for example 80, udp:53 or [2001:db8::1]:80";
        let (protocol, text) = protocol_of(text);
        let online = online_endpoint(text, form)?;
        if online.port == 0 {
            bail!("port 0 cannot be recorded; {form}");
        }
        Ok(RecordedArg { protocol, online })
    }
}

/// Keys of `--config` that a running role takes over.
const LIVE: [&str; 7] = ["duration", "file-seconds", "file-size", "files", "packets", "report", "sample"];

/// Records until a limit is reached, or SIGTERM or SIGINT. SIGHUP has the configuration read again and completes the file that is being written; the
/// next packet begins another.
///
/// # Errors
/// When it cannot start, with the cause and the remedy; when a file cannot be written; when packets were lost.
pub fn run(mut args: RecordArgs, mut configuration: Configuration) -> Result<()> {
    privileges::check()?;
    report::check_writable(args.report.as_deref())?;
    let clients = args.whose.chosen()?;
    let signals = Signals::install()?;
    let mut files = RotatingFiles::new(&args)?;
    let mut network = Network::open()?;
    let device = network.device(&args.interface)?;
    if !device.up {
        return Err(NetError::Down { name: device.name }.into());
    }
    let services: BTreeSet<_> =
        args.services.iter().map(|s| (s.protocol, s.online.ip, s.online.port)).collect();
    let wildcard = services.iter().any(|(_, ip, _)| *ip == ANY);
    let facts = Facts::find(&mut network, &device, wildcard)?;
    let (backend, why) = choice::choose(args.capture, &device, &facts)?;
    let mut capture = Capture::prepare(backend, &device, &services, &clients, 1)?;
    let mut taking = Taking::open(&mut capture, backend, &device)?;
    capture.configure(1, sample_threshold(args.sample.0))?;
    signals.clean_from_here();
    capture.attach()?;
    privileges::drop_all_but(Keep::Main);
    say!("capturing on {capture}, writing {}", files.name(files.number + 1).display());
    say!("{backend}: {why}");
    say::ready(format_args!("stop with SIGTERM or Ctrl-C"));

    let ended = record(&mut args, &signals, &mut taking, &mut files, |args, files| {
        configuration.reload(&LIVE, |role| {
            let Some(Role::Record(new)) = role else { return Ok(()) };
            report::check_writable(new.report.as_deref())?;
            duration_of(&new)?;
            let limits = Limits::of(&new)?;
            capture.configure(1, sample_threshold(new.sample.0))?;
            files.limits = limits;
            *args = new;
            Ok(())
        });
    });
    capture.detach();
    // What the kernel had taken before is still written.
    while ended.is_ok() && taking.take(&mut files, args.packets)? > 0 {}
    let finished = files.finish();
    let verdicts = capture.verdicts();
    let lost = verdicts.lost() + taking.lost();
    say!("{} packets, {} bytes in {} files", files.packets, files.bytes, files.made);
    let not_chosen = verdicts.not_chosen();
    if not_chosen > 0 {
        say!("{not_chosen} packets of clients that were not chosen (--clients, --exclude-clients)");
    }
    if let Some(path) = &args.report {
        let report = Report {
            role: "record",
            version: env!("CARGO_PKG_VERSION"),
            packets: files.packets,
            bytes: files.bytes,
            files: files.made,
            packets_lost: lost,
            kernel: &verdicts,
        };
        report::write(path, &report, &[])?;
    }
    ended?;
    finished?;
    if lost > 0 {
        bail!(
            "{lost} packets were lost between kernel and files: the recording has holes; write to a faster disk, or record a sample (-r)"
        );
    }
    Ok(())
}

/// For `--report`.
#[derive(Serialize)]
struct Report<'a> {
    role: &'static str,
    version: &'static str,
    packets: u64,
    bytes: u64,
    files: u64,
    packets_lost: u64,
    kernel: &'a Verdicts,
}

fn duration_of(args: &RecordArgs) -> Result<Option<Duration>> {
    args.duration.map(Duration::try_from_secs_f64).transpose().context("--duration")
}

fn record(
    args: &mut RecordArgs,
    signals: &Signals,
    taking: &mut Taking,
    files: &mut RotatingFiles,
    mut reload: impl FnMut(&mut RecordArgs, &mut RotatingFiles),
) -> Result<()> {
    let started = Instant::now();
    let mut duration = duration_of(args)?;
    let mut taken_at = started;
    loop {
        let count = taking.take(files, args.packets)?;
        files.rotate_if_old()?;
        if args.packets.is_some_and(|limit| files.packets >= limit)
            || duration.is_some_and(|duration| started.elapsed() >= duration)
        {
            return Ok(());
        }
        match signals.take() {
            Some(Asked::Stop) => return Ok(()),
            Some(Asked::Reload) => {
                reload(args, files);
                duration = duration_of(args)?;
                files.finish()?;
                say!("SIGHUP: {} files are complete", files.made);
            }
            None => {}
        }
        if count >= BATCH {
            continue;
        }
        let now = Instant::now();
        if count > 0 {
            taken_at = now;
        }
        let (fd, wakes) = taking.before_sleep(now - taken_at)?;
        let interval = if wakes { LOOK_INTERVAL } else { BUSY_INTERVAL };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(interval.as_millis()).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for packets"),
        }
    }
}

/// Where packets come from.
enum Taking {
    Port(Box<Port>, Vec<Received>),
    Ring(Box<Reader>, Vec<u8>),
}

impl Taking {
    fn open(capture: &mut Capture, backend: Backend, device: &Device) -> Result<Taking> {
        if backend == Backend::Span && device.receive_queues_in_use() > 1 {
            let name = &device.name;
            bail!(
                "{name} has several receive queues, and packets are recorded from one: `ethtool -L {name} combined 1` (`rx 1` where \
                 `ethtool -l {name}` shows no combined ones)"
            );
        }
        let port = match capture.receiving_end(0) {
            Some(rx) => Some(Port::open(&PortConfig {
                frames: FRAMES,
                frame_size: if device.mtu + ETHERNET_HEADER <= 2048 - 256 { 2048 } else { 4096 },
                rx: Some(rx),
                tx: None,
                zero_copy: false,
            })?),
            None => None,
        };
        Ok(match (capture.source(0, 1, port.as_ref())?, port) {
            (Source::Ring(reader), _) => Taking::Ring(reader, Vec::new()),
            (Source::Port(received), port) => {
                Taking::Port(Box::new(port.context("the back end has no port")?), received)
            }
        })
    }

    /// Writes what has come, about a batch at most; how many packets.
    fn take(&mut self, files: &mut RotatingFiles, limit: Option<u64>) -> Result<usize> {
        let (time_ns, now) =
            (SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64), clock::now());
        let mut written = Ok(());
        let mut count = 0;
        let mut write = |captured_ns: u64, bytes: &[u8]| {
            let time_ns = (time_ns + captured_ns).saturating_sub(now);
            count += 1;
            if written.is_ok() && limit.is_none_or(|limit| files.packets < limit) {
                written = files.packet(time_ns, bytes);
            }
        };
        match self {
            Taking::Port(port, received) => {
                port.receive(received);
                for packet in received.drain(..) {
                    let bytes = port.frame(&packet.frame);
                    // When it came to the socket nobody has noted.
                    write(now, &bytes[..(packet.len as usize).min(bytes.len())]);
                    port.release(packet.frame);
                }
                port.reclaim();
            }
            Taking::Ring(reader, scratch) => {
                for _ in 0..BATCH {
                    if !reader.next_packets(scratch, &mut write) {
                        break;
                    }
                }
            }
        }
        written.map(|()| count)
    }

    /// What becomes readable when there is something more, and whether it wakes somebody then: `idle` after the last packet.
    fn before_sleep(&mut self, idle: Duration) -> Result<(BorrowedFd<'_>, bool)> {
        match self {
            Taking::Port(port, _) => Ok((port.rx_fd().context("the port has no capture side")?, true)),
            Taking::Ring(reader, _) => {
                let wakes = reader.about_to_sleep(idle.as_nanos() as u64).is_none();
                Ok((Reader::as_fd(reader), wakes))
            }
        }
    }

    /// Packets that came to the socket and were lost there.
    fn lost(&self) -> u64 {
        match self {
            Taking::Port(port, _) => port.statistics().map(|statistics| statistics.rx.lost()).unwrap_or(0),
            Taking::Ring(..) => 0,
        }
    }
}

/// How large and how old a file becomes, and how many there are.
#[derive(Debug)]
struct Limits {
    bytes: u64,
    age: Option<Duration>,
    files: Option<usize>,
}

impl Limits {
    fn of(args: &RecordArgs) -> Result<Limits> {
        if !(0.001..=1e9).contains(&args.file_size) {
            bail!("--file-size {}: give 0.001 to 1000000000 MB", args.file_size);
        }
        if args.files == Some(0) {
            bail!("--files 0: keep at least 1");
        }
        let age = args.file_seconds.map(Duration::try_from_secs_f64).transpose().context("--file-seconds")?;
        Ok(Limits { bytes: (args.file_size * 1e6) as u64, age, files: args.files })
    }
}

/// Files one after the other.
#[derive(Debug)]
struct RotatingFiles {
    prefix: PathBuf,
    limits: Limits,
    current: Option<(NgWriter<BufWriter<File>>, PathBuf, Instant)>,
    /// That of the newest.
    number: u32,
    kept: VecDeque<PathBuf>,
    packets: u64,
    bytes: u64,
    made: u64,
}

impl RotatingFiles {
    fn new(args: &RecordArgs) -> Result<RotatingFiles> {
        let directory =
            args.prefix.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !directory.is_dir() {
            bail!("{} is not a directory; name one that exists with -w", directory.display());
        }
        let mut files = RotatingFiles {
            prefix: args.prefix.clone(),
            limits: Limits::of(args)?,
            current: None,
            number: 0,
            kept: VecDeque::new(),
            packets: 0,
            bytes: 0,
            made: 0,
        };
        // A recording before this one is not overwritten.
        files.number = files.highest(directory)?;
        Ok(files)
    }

    /// The highest number of the files that are there already.
    fn highest(&self, directory: &Path) -> Result<u32> {
        let prefix =
            self.prefix.file_name().map_or_else(String::new, |name| format!("{}-", name.to_string_lossy()));
        let entries =
            fs::read_dir(directory).with_context(|| format!("cannot look into {}", directory.display()))?;
        let number =
            |name: String| -> Option<u32> { name.strip_prefix(&prefix)?.split_once('.')?.0.parse().ok() };
        Ok(entries
            .flatten()
            .filter_map(|entry| number(entry.file_name().into_string().ok()?))
            .max()
            .unwrap_or(0))
    }

    fn name(&self, number: u32) -> PathBuf {
        let mut name = self.prefix.clone().into_os_string();
        name.push(format!("-{number:05}.pcapng"));
        name.into()
    }

    fn packet(&mut self, time_ns: u64, frame: &[u8]) -> Result<()> {
        if self.current.as_ref().is_some_and(|(writer, ..)| writer.written() >= self.limits.bytes) {
            self.finish()?;
        }
        if self.current.is_none() {
            self.number += 1;
            let path = self.name(self.number);
            let writer = NgWriter::create(&part(&path)).with_context(|| {
                format!("cannot write {}; choose a writable path with -w", part(&path).display())
            })?;
            self.current = Some((writer, path, Instant::now()));
        }
        if let Some((writer, path, _)) = &mut self.current {
            writer.packet(time_ns, frame).with_context(|| format!("cannot write {}", path.display()))?;
        }
        self.packets += 1;
        self.bytes += frame.len() as u64;
        Ok(())
    }

    fn rotate_if_old(&mut self) -> Result<()> {
        let old = |since: &Instant| self.limits.age.is_some_and(|age| since.elapsed() >= age);
        if self.current.as_ref().is_some_and(|(_, _, since)| old(since)) {
            self.finish()?;
        }
        Ok(())
    }

    /// Completes the file that is being written, and removes the oldest when there are too many.
    fn finish(&mut self) -> Result<()> {
        let Some((mut writer, path, _)) = self.current.take() else { return Ok(()) };
        writer
            .flush()
            .and_then(|()| fs::rename(part(&path), &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        self.made += 1;
        self.kept.push_back(path);
        while self.limits.files.is_some_and(|limit| self.kept.len() > limit) {
            if let Some(oldest) = self.kept.pop_front() {
                fs::remove_file(&oldest).with_context(|| format!("cannot remove {}", oldest.display()))?;
            }
        }
        Ok(())
    }
}

fn part(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pcap::{Files, Order};

    fn files(name: &str, file_size: f64, keep: Option<usize>) -> RotatingFiles {
        let dir = std::env::temp_dir().join(format!("replayer-record-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        RotatingFiles::new(&RecordArgs {
            config: ConfigArg::default(),
            services: Vec::new(),
            interface: String::new(),
            capture: CaptureArg::Auto,
            prefix: dir.join("a"),
            file_size,
            file_seconds: None,
            files: keep,
            duration: None,
            packets: None,
            whose: ClientArgs::default(),
            sample: PercentArg(100.0),
            report: None,
        })
        .unwrap()
    }

    #[test]
    fn files_follow_each_other_and_the_oldest_go() {
        let mut recorded = files("rotate", 0.001, Some(2));
        for i in 0..100u64 {
            recorded.packet(1_000_000_000 + i, &[i as u8; 64]).unwrap();
        }
        recorded.finish().unwrap();
        assert!(recorded.made > 5, "{recorded:?}");
        let kept: Vec<PathBuf> = recorded.kept.iter().cloned().collect();
        assert_eq!(kept.len(), 2);
        let directory = kept[0].parent().unwrap().to_owned();
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2, "the others are gone");
        let mut read = Files::open(&kept, Order::Merged).unwrap();
        let mut last = 0;
        while read.advance() {
            last = read.packet().unwrap().time_ns;
        }
        assert!(read.problems().is_empty());
        assert_eq!(last, 1_000_000_099);
        // The next recording goes on after the last number.
        let next = files("rotate", 1.0, None);
        assert_eq!(next.number, recorded.number);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn services_to_be_recorded() {
        assert_eq!(
            "80".parse::<RecordedArg>().unwrap(),
            RecordedArg { protocol: Protocol::Tcp, online: Endpoint { ip: ANY, port: 80 } }
        );
        assert_eq!("udp:53".parse::<RecordedArg>().unwrap().protocol, Protocol::Udp);
        assert!(
            "192.0.2.1:80".parse::<RecordedArg>().is_ok()
                && "[2001:db8::1]:80".parse::<RecordedArg>().is_ok()
        );
        assert!("0".parse::<RecordedArg>().is_err() && "x".parse::<RecordedArg>().is_err());
    }
}
