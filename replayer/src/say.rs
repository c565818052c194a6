//! What roles say to people, on standard error, as text or as JSON. Whoever reads it may be gone, which ends no replay: `eprintln!` would panic.
//!
//! - `say!`, `caution!`: a message; as text it begins with the role
//! - `plain!`: one that as text stands for itself: a line of figures, a report
//! - `show!`: what a terminal shows for a moment; a log has nothing of it
//! - the macros of the crate `log`: what happens to connections and threads

use clap::ValueEnum;
use jiff::Timestamp;
use log::Level;
use serde::Serialize;
use serde_json::{Map, Value};
use std::fmt;
use std::io::{IsTerminal, Write};
use std::sync::OnceLock;

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
pub fn begin(role: &'static str, format: LogFormat) {
    let _ = SPEAKER.set(Speaker { format, role });
    let mut builder = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    if format == LogFormat::Json {
        builder.format(|out, record| {
            out.write_all(json(record.level(), record.args().to_string(), Map::new()).as_bytes())
        });
        // What a thread dies of is a line of the log like any other.
        std::panic::set_hook(Box::new(|panic| {
            write(&json(Level::Error, panic.to_string(), Map::new()));
        }));
    }
    builder.format_target(false).init();
}

/// The error that a role ends with.
pub fn fatal(error: &anyhow::Error) {
    match speaker().format {
        LogFormat::Text => write(&format!("replayer: {error:#}\n")),
        LogFormat::Json => write(&json(Level::Error, format!("{error:#}"), Map::new())),
    }
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
    let Speaker { format, role } = speaker();
    match (format, prefix) {
        (LogFormat::Json, _) => {
            let Value::Object(fields) = fields else {
                return write(&json(level, message.to_string(), Map::new()));
            };
            write(&json(level, message.to_string(), fields));
        }
        (LogFormat::Text, Prefix::Nothing) => write(&format!("{message}\n")),
        (LogFormat::Text, Prefix::Role) => {
            let warning = if level == Level::Warn { "warning: " } else { "" };
            write(&format!("{role}: {warning}{message}\n"));
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
    let _ = std::io::stderr().write_all(text.as_bytes());
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
