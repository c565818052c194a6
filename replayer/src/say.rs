//! What roles say to people, on standard error, as text or as JSON. Whoever reads it may be gone, which ends no replay: `eprintln!` would panic. Or
//! stand still, as a pager does: a thread of its own writes, nobody waits for it, and what it has no room for is counted.
//!
//! - `say!`, `caution!`: a message; as text it begins with the role
//! - `plain!`: one that as text stands for itself: a line of figures, a report
//! - `show!`: what a terminal shows for a moment; a log has nothing of it
//! - the macros of the crate `log`: what happens to connections and threads

use crate::privileges::{self, Keep};
use clap::ValueEnum;
use jiff::Timestamp;
use log::Level;
use serde::Serialize;
use serde_json::{Map, Value};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::{IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// How messages look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line: time, level, role, message, and what else there is to say.
    Json,
}

/// Set once, before anything is said.
static SPEAKER: OnceLock<Speaker> = OnceLock::new();
/// Set with it: one for messages, one for figures, so that neither waits for the other's reader.
static QUEUES: [OnceLock<SyncSender<Outgoing>>; 2] = [const { OnceLock::new() }; 2];
/// What they had no room for.
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// Texts that wait to be written to each, at most: minutes of those that are said every second, and any report.
const WAITING: usize = 1024;
/// How long the end of a role waits for its last words to be written.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);

/// Where something is written; the number of its queue.
#[derive(Clone, Copy)]
enum To {
    StandardError = 0,
    StandardOutput = 1,
}

/// What is in a queue.
enum Outgoing {
    Text(String),
    /// To be answered when all before was written.
    Mark(SyncSender<()>),
}

struct Speaker {
    format: LogFormat,
    role: &'static str,
}

/// In tests of the library nobody has introduced himself.
const NOBODY: Speaker = Speaker { format: LogFormat::Text, role: "replayer" };

fn speaker() -> &'static Speaker {
    SPEAKER.get().unwrap_or(&NOBODY)
}

/// Says who speaks from now on, and how. Of the crate `log`, `RUST_LOG=debug` shows more, `RUST_LOG=error` less.
pub fn begin(role: &'static str, format: LogFormat) -> LastWords {
    let _ = SPEAKER.set(Speaker { format, role });
    for to in [To::StandardError, To::StandardOutput] {
        let (queue, outgoing) = sync_channel(WAITING);
        let writer = std::thread::Builder::new().name("messages".into()).spawn(move || {
            privileges::drop_all_but(Keep::Nothing);
            serve(to, &outgoing);
        });
        if writer.is_ok() {
            let _ = QUEUES[to as usize].set(queue);
        }
    }
    let mut builder = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    builder.target(env_logger::Target::Pipe(Box::new(Log)));
    if format == LogFormat::Json {
        builder.format(|out, record| {
            out.write_all(json(record.level(), record.args().to_string(), Map::new()).as_bytes())
        });
    }
    // What a thread dies of is a line of the log like any other, and waits for nobody either.
    std::panic::set_hook(Box::new(|panic| match speaker().format {
        LogFormat::Json => write(&json(Level::Error, panic.to_string(), Map::new())),
        LogFormat::Text => {
            let (thread, backtrace) = (std::thread::current(), Backtrace::capture());
            let trace = if backtrace.status() == BacktraceStatus::Captured {
                backtrace.to_string()
            } else {
                String::new()
            };
            write(&format!("thread '{}' {panic}\n{trace}", thread.name().unwrap_or_default()));
        }
    }));
    builder.format_target(false).init();
    LastWords
}

/// What `log` writes, a line at a time.
struct Log;

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        write(&String::from_utf8_lossy(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Writes what comes by a queue, as fast as it is read.
fn serve(to: To, outgoing: &Receiver<Outgoing>) {
    match to {
        To::StandardError => write_all(std::io::stderr(), Some(&LEFT_OUT), outgoing),
        To::StandardOutput => write_all(std::io::stdout(), None, outgoing),
    }
}

/// `left_out`: so many that had no room are to be told of.
fn write_all(mut out: impl Write, left_out: Option<&AtomicU64>, outgoing: &Receiver<Outgoing>) {
    for next in outgoing {
        // Whoever reads it may be gone.
        if let Outgoing::Text(text) = &next {
            let _ = out.write_all(text.as_bytes());
        }
        // In front of a mark: it may be the last that is said.
        let left_out = left_out.map_or(0, |count| count.swap(0, Ordering::Relaxed));
        if left_out > 0 {
            let text = format_args!(
                "{left_out} messages or lines of figures were left out: they were not read in time"
            );
            let _ = out.write_all(text_of(Level::Warn, Prefix::Role, Value::Null, text).as_bytes());
        }
        if let Outgoing::Mark(seen) = next {
            let _ = seen.send(());
        }
    }
}

/// False when there was no room.
fn send(to: To, outgoing: Outgoing) -> bool {
    match QUEUES[to as usize].get() {
        Some(queue) => queue.try_send(outgoing).is_ok(),
        // Before a role has begun, and in tests of the library.
        None => {
            let (queue, only) = sync_channel(1);
            let sent = queue.try_send(outgoing).is_ok();
            drop(queue);
            serve(to, &only);
            sent
        }
    }
}

fn send_text(to: To, text: String) {
    if !send(to, Outgoing::Text(text)) {
        LEFT_OUT.fetch_add(1, Ordering::Relaxed);
    }
}

/// Waits, when it is dropped, until all that was said is written: also where the process ends by a panic.
#[derive(Debug)]
#[must_use]
pub struct LastWords;

impl Drop for LastWords {
    fn drop(&mut self) {
        finish();
    }
}

/// Waits until all that was said is written, or for [`LAST_WORDS_LIMIT`].
pub fn finish() {
    let until = Instant::now() + LAST_WORDS_LIMIT;
    for to in [To::StandardError, To::StandardOutput] {
        let (seen, written) = sync_channel(1);
        while !send(to, Outgoing::Mark(seen.clone())) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = written.recv_timeout(until.saturating_duration_since(Instant::now()));
    }
}

/// A line of figures for programs, to standard output.
pub(crate) fn figures(line: &str) {
    send_text(To::StandardOutput, format!("{line}\n"));
}

/// The error that a role ends with.
pub fn fatal(error: &anyhow::Error) {
    let text = told(error);
    match speaker().format {
        LogFormat::Text => write(&format!("replayer: {text}\n")),
        LogFormat::Json => write(&json(Level::Error, text, Map::new())),
    }
}

/// An error with its causes, each once: some errors say theirs themselves, in front of the remedy.
pub(crate) fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text += ": ";
            text += &cause;
        }
    }
    text
}

/// That the role does from now on what it is for.
pub(crate) fn ready(message: fmt::Arguments<'_>) {
    match speaker().format {
        LogFormat::Text => write(&format!("{} ready: {message}\n", speaker().role)),
        LogFormat::Json => write(&json(Level::Info, format!("ready: {message}"), Map::new())),
    }
}

/// Whether there is a terminal to be shown something.
pub(crate) fn to_terminal() -> bool {
    speaker().format == LogFormat::Text && std::io::stderr().is_terminal()
}

/// What a message is preceded by, as text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prefix {
    Role,
    Nothing,
}

/// Says something; `fields`, an object, are for programs.
pub(crate) fn message(level: Level, prefix: Prefix, fields: Value, message: fmt::Arguments<'_>) {
    write(&text_of(level, prefix, fields, message));
}

fn text_of(level: Level, prefix: Prefix, fields: Value, message: fmt::Arguments<'_>) -> String {
    let Speaker { format, role } = speaker();
    match (format, prefix) {
        (LogFormat::Json, _) => {
            let fields = if let Value::Object(fields) = fields { fields } else { Map::new() };
            json(level, message.to_string(), fields)
        }
        (LogFormat::Text, Prefix::Nothing) => format!("{message}\n"),
        (LogFormat::Text, Prefix::Role) => {
            let warning = if level == Level::Warn { "warning: " } else { "" };
            format!("{role}: {warning}{message}\n")
        }
    }
}

/// One line, in one piece: several threads speak, and perhaps several processes to one file.
fn json(level: Level, message: String, fields: Map<String, Value>) -> String {
    #[derive(Serialize)]
    struct Line {
        time: String,
        level: String,
        role: &'static str,
        message: String,
        #[serde(flatten)]
        fields: Map<String, Value>,
    }
    let line = Line {
        time: format!("{:.3}", Timestamp::now()),
        level: level.as_str().to_lowercase(),
        role: speaker().role,
        message: message.trim_end().to_owned(),
        fields,
    };
    serde_json::to_string(&line).unwrap_or_default() + "\n"
}

/// To standard error, whether somebody reads it or not.
pub(crate) fn write(text: &str) {
    send_text(To::StandardError, text.to_owned());
}

/// A message.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::say::message(log::Level::Info, $crate::say::Prefix::Role, serde_json::Value::Null, format_args!($($text)*))
    };
}

/// Something that somebody should look at; with the object of its fields in front, if it has any.
macro_rules! caution {
    ($fields:expr; $($text:tt)*) => {
        $crate::say::message(log::Level::Warn, $crate::say::Prefix::Role, $fields, format_args!($($text)*))
    };
    ($($text:tt)*) => { $crate::say::caution!(serde_json::Value::Null; $($text)*) };
}

/// A message that as text has nothing in front; with the object of its fields, if it has any.
macro_rules! plain {
    ($fields:expr; $($text:tt)*) => {
        $crate::say::message(log::Level::Info, $crate::say::Prefix::Nothing, $fields, format_args!($($text)*))
    };
    ($($text:tt)*) => { $crate::say::plain!(serde_json::Value::Null; $($text)*) };
}

/// Part of a line of a terminal ([`to_terminal`]).
macro_rules! show {
    ($($text:tt)*) => { $crate::say::write(&format!($($text)*)) };
}

pub(crate) use {caution, plain, say, show};

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn what_was_left_out_is_told_where_messages_are_before_the_last_word() {
        let (left_out, mut figures, mut messages) = (AtomicU64::new(7), Vec::new(), Vec::new());
        for (out, counted) in [(&mut figures, None), (&mut messages, Some(&left_out))] {
            let (queue, outgoing) = sync_channel(2);
            let (seen, _written) = sync_channel(1);
            queue.send(Outgoing::Text("said\n".into())).unwrap();
            queue.send(Outgoing::Mark(seen)).unwrap();
            drop(queue);
            write_all(out, counted, &outgoing);
        }
        assert_eq!(figures, b"said\n");
        let messages = String::from_utf8(messages).unwrap();
        assert!(messages.starts_with("said\nreplayer: warning: 7 messages or lines"), "{messages}");
        assert_eq!(left_out.into_inner(), 0);
    }

    #[test]
    fn b009_a_cause_is_told_once() {
        let error = anyhow!("the disk is full")
            .context("cannot write: the disk is full; make room")
            .context("no report");
        assert_eq!(told(&error), "no report: cannot write: the disk is full; make room");
        assert_eq!(told(&anyhow!("x").context("y")), "y: x");
    }
}
