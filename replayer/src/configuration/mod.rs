//! `--config FILE`: flags from a TOML file, at the start and again on SIGHUP.
//!
//! The file has a table for each role, whose keys are the role's long flags. They are turned into arguments behind those that were typed, so that
//! there is one place where a flag is defined and checked: the command line. What is typed, or in the environment, wins over what is in the file.
//!
//! - `file`: what the table says, as arguments

use crate::cli::{Cli, Role};
use crate::privileges;
use crate::say::{caution, say, told};
use anyhow::{Result, anyhow};
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, CommandFactory, Parser};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

mod file;

use file::{CONFIG, Mistake, settings};

pub use file::{Setting, Settings};

/// Names the file.
#[derive(Clone, Debug, Default, Args)]
pub struct ConfigArg {
    /// Take flags from this TOML file: the table with the role's name has the long flags as keys. What is typed wins; SIGHUP has it read again
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What was typed, and what the file adds to it.
#[derive(Clone, Debug, Default)]
pub struct Configuration {
    typed: Vec<OsString>,
    file: Option<PathBuf>,
    /// What has effect.
    settings: Settings,
}

/// Context of an error after a part of the file was taken over: what was, and what was not.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct Partly(pub &'static str);

impl Configuration {
    /// Parses what was typed, the program's name first, together with the file that it names.
    ///
    /// # Errors
    /// A [`clap::Error`] for what was typed, which may be no mistake but a call for help; another one for the file, with line and key.
    pub fn parse(typed: Vec<OsString>) -> Result<(Cli, Configuration)> {
        // Where something is wrong with what was typed, or a required flag is in the file only, this tells what is there all the same.
        let mut command = Cli::command().ignore_errors(true);
        command.build();
        let seen = command.clone().try_get_matches_from(&typed);
        let named = seen.as_ref().ok().and_then(|seen| {
            let (command, seen) = role_of(&command, seen);
            let names_it = command.get_arguments().any(|argument| argument.get_id() == CONFIG);
            let file = names_it.then(|| seen.get_one::<PathBuf>(CONFIG)).flatten()?;
            Some((command, seen, file))
        });
        let Some((command, seen, file)) = named else {
            return Ok((Cli::try_parse_from(&typed)?, Configuration::default()));
        };
        let text = std::fs::read_to_string(file).map_err(|error| {
            let remedy = privileges::remedy(file, &error);
            anyhow::Error::new(error)
                .context(format!("--config {}: cannot be read; name a TOML file{remedy}", file.display()))
        })?;
        let mut settings = settings(&text, command).map_err(|mistake| mistake.of(file))?;
        let overridden = overridden(command, seen);
        settings.retain(|key, _| !overridden.contains(key));
        let from_file = settings.values().flat_map(|setting| &setting.arguments).map(OsString::from);
        let cli = Cli::try_parse_from(typed.iter().cloned().chain(from_file))
            .map_err(|error| locate(error, file, &settings))?;
        let file = Some(file.clone());
        Ok((cli, Configuration { typed, file, settings }))
    }

    /// Warns where a key is in a file that others than its owner may read.
    pub fn say_who_reads_the_key(&self) {
        let Some(file) = self.file.as_ref().filter(|_| self.settings.contains_key("key")) else { return };
        let open = file.metadata().is_ok_and(|found| found.permissions().mode() & 0o077 != 0);
        if open {
            let file = file.display();
            caution!(
                "{file} has a key in it, and others than its owner may read it: `chmod 600 {file}` ends that"
            );
        }
    }

    /// Warns where this process, with the rights that it has kept, may not read the file again.
    pub fn say_if_out_of_reach(&self) {
        let Some(file) = &self.file else { return };
        if let Err(error) = File::open(file) {
            caution!(
                "SIGHUP will not have {} read again: {error}{}",
                file.display(),
                privileges::remedy(file, &error)
            );
        }
    }

    /// What SIGHUP asks for: reads the file again, if there is one. `apply` takes over what a running role can, or fails and changes nothing, but
    /// for an error that is [`Partly`]; `live` are the keys of that. Says what has come of it, and names the keys that need a restart.
    pub fn reload(&mut self, live: &[&str], apply: impl FnOnce(Option<Role>) -> Result<()>) {
        if let Err(error) = self.try_reload(live, apply) {
            say_not_taken_over(&error);
        }
    }

    fn try_reload(&mut self, live: &[&str], apply: impl FnOnce(Option<Role>) -> Result<()>) -> Result<()> {
        let Some((role, settings)) = self.read_again()? else { return apply(None) };
        apply(Some(role))?;
        self.taken_over(settings, live);
        Ok(())
    }

    /// What the file says now; `None`: there is none.
    ///
    /// # Errors
    /// As [`Configuration::parse`], in one line.
    pub fn read_again(&self) -> Result<Option<(Role, Settings)>> {
        if self.file.is_none() {
            return Ok(None);
        }
        let (cli, new) = Configuration::parse(self.typed.clone()).map_err(|error| {
            error.downcast::<clap::Error>().map_or_else(|other| other, |it| anyhow!(text_of(&it)))
        })?;
        Ok(Some((cli.role, new.settings)))
    }

    /// `new` was read again and has effect, as far as `live` has its keys. Says what is different, and what needs a restart.
    pub fn taken_over(&mut self, new: Settings, live: &[&str]) {
        let Some(file) = &self.file else { return };
        let (changed, later): (Vec<&str>, Vec<&str>) =
            changes(&self.settings, &new).into_iter().partition(|key| live.contains(key));
        let file = file.display();
        if !changed.is_empty() {
            say!("SIGHUP: from now on as {file} says: {}", changed.join(", "));
        }
        if !later.is_empty() {
            caution!("SIGHUP: changed in {file}, but needs a restart: {}", later.join(", "));
        }
        if changed.is_empty() && later.is_empty() {
            say!("SIGHUP: {file} says what it said before");
        }
        // What waits for a restart is compared with what has effect next time too.
        let waiting: BTreeSet<String> = later.into_iter().map(str::to_owned).collect();
        let before = std::mem::take(&mut self.settings);
        self.settings = new.into_iter().filter(|(key, _)| !waiting.contains(key)).collect();
        self.settings.extend(before.into_iter().filter(|(key, _)| waiting.contains(key)));
    }
}

/// What a running role did not take over, and why.
pub fn say_not_taken_over(error: &anyhow::Error) {
    let rest = if error.is::<Partly>() { "" } else { "; everything stays as it is" };
    caution!("SIGHUP: {}{rest}", told(error));
}

/// The keys that do not say the same.
fn changes<'a>(before: &'a Settings, now: &'a Settings) -> BTreeSet<&'a str> {
    let says = |settings: &'a Settings, key: &str| settings.get(key).map(|setting| &setting.arguments);
    let keys = before.keys().chain(now.keys());
    keys.filter(|key| says(before, key) != says(now, key)).map(String::as_str).collect()
}

/// The command of the role that was typed, to be checked only or not.
fn role_of<'a>(mut command: &'a Command, mut seen: &'a ArgMatches) -> (&'a Command, &'a ArgMatches) {
    while let Some((name, of_it)) = seen.subcommand()
        && let Some(sub) = command.find_subcommand(name)
    {
        (command, seen) = (sub, of_it);
    }
    (command, seen)
}

/// Keys that have no effect: they were typed or are in the environment, or another one of their group was.
fn overridden(command: &Command, seen: &ArgMatches) -> BTreeSet<String> {
    // A variable that is there and empty says nothing.
    let is_empty = |id: &str| seen.get_raw(id).is_some_and(|mut values| values.all(OsStr::is_empty));
    let given = |id: &str| match seen.value_source(id) {
        Some(ValueSource::CommandLine) => true,
        Some(ValueSource::EnvVariable) => !is_empty(id),
        _ => false,
    };
    let mut over: BTreeSet<&str> =
        command.get_arguments().map(|argument| argument.get_id().as_str()).filter(|id| given(id)).collect();
    for group in command.get_groups() {
        let of_group: Vec<&str> = group.get_args().map(clap::Id::as_str).collect();
        if !group.clone().is_multiple() && of_group.iter().any(|id| over.contains(id)) {
            over.extend(of_group);
        }
    }
    let keys = command.get_arguments().filter(|argument| over.contains(argument.get_id().as_str()));
    keys.filter_map(Arg::get_long).map(str::to_owned).collect()
}

/// An error of the command line, with line and key where it is about what the file has added.
fn locate(error: clap::Error, file: &Path, settings: &Settings) -> anyhow::Error {
    let about = |kind: ContextKind| match error.get(kind) {
        // `--copies <COPIES>`
        Some(ContextValue::String(flag)) => {
            let key = flag.strip_prefix("--")?.split([' ', '=']).next()?;
            Some((key.to_owned(), settings.get(key)?.line))
        }
        _ => None,
    };
    match about(ContextKind::InvalidArg).or_else(|| about(ContextKind::PriorArg)) {
        Some((key, line)) => Mistake { line, what: format!("{key}: {}", text_of(&error)) }.of(file),
        None => error.into(),
    }
}

/// What an error of the command line says, without how to use it.
fn text_of(error: &clap::Error) -> String {
    let text = error.to_string();
    let what = text.split("\n\n").next().unwrap_or_default();
    let lines: Vec<&str> = what.trim_start_matches("error: ").lines().map(str::trim).collect();
    lines.join(" ")
}

#[cfg(test)]
mod tests {
    use super::file::ROLES;
    use super::*;
    use crate::capture::CaptureArg;
    use crate::cli::{CheckedRole, Role};
    use crate::offline::pace::Speed;
    use crate::online::OnlineArgs;
    use crate::say::LogFormat;
    use anyhow::bail;

    /// A role with a file of this text.
    fn parsed(text: &str, typed: &str) -> Result<Cli> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("replayer-{}-{number}.toml", std::process::id()));
        std::fs::write(&path, text).unwrap();
        let mut line: Vec<OsString> = format!("replayer {typed}").split(' ').map(OsString::from).collect();
        line.extend(["--config".into(), path.clone().into()]);
        let result = Configuration::parse(line).map(|(cli, _)| cli);
        std::fs::remove_file(path).unwrap();
        result
    }

    fn online(text: &str, typed: &str) -> OnlineArgs {
        match parsed(text, typed).unwrap().role {
            Role::Online(args) => *args,
            role => panic!("{role:?}"),
        }
    }

    const FILE: &str = "[online]\n\
        service = ['80-192.0.2.7:80', 'udp:53-192.0.2.7:53']\n\
        assistant = \"192.0.2.30\"\n\
        log-format = \"json\"\n\
        capture = 'ring'\n\
        copies = 2.5\n\
        stats = 5 # seconds\n\
        no-wait = true\n\
        zero-copy = false\n\
        [assistant]\n\
        interface = 'eth1'\n";

    #[test]
    fn the_table_of_the_role_is_typed_for_the_user() {
        let args = online(FILE, "online");
        assert_eq!((args.replay.services.len(), args.assistants.len()), (2, 1));
        assert_eq!((args.replay.copies.0, args.replay.stats), (2_500_000, Some(5)));
        assert_eq!((args.capture, args.replay.no_wait, args.zero_copy), (CaptureArg::Ring, true, false));
        assert_eq!(parsed(FILE, "online").unwrap().log_format, LogFormat::Json);
        let Role::Assistant(args) = parsed(FILE, "assistant").unwrap().role else { panic!() };
        assert_eq!(args.interface.as_deref(), Some("eth1"));
        let Role::Check(check) = parsed(FILE, "check online").unwrap().role else { panic!() };
        assert!(matches!(check.role, CheckedRole::Online(args) if args.replay.services.len() == 2));
    }

    #[test]
    fn what_is_typed_wins() {
        let typed = "--log-format text online -s 192.0.2.31,192.0.2.32 -x 81-192.0.2.7:81 --copies 3";
        let args = online(FILE, typed);
        assert_eq!(args.assistants, ["192.0.2.31", "192.0.2.32"]);
        assert_eq!((args.replay.services.len(), args.replay.copies.0), (1, 3_000_000));
        assert_eq!(args.replay.stats, Some(5));
        assert_eq!(parsed(FILE, typed).unwrap().log_format, LogFormat::Text);
        // One of several flags of which there can be one.
        let file = "[offline]\nfile = 'a'\nservice = '80-192.0.2.7:80'\ndry-run = true\nspeed = 'max'";
        let speed = |typed: &str| match parsed(file, typed).unwrap().role {
            Role::Offline(args) => args.pace().unwrap(),
            role => panic!("{role:?}"),
        };
        assert_eq!(speed("offline"), Speed::Max);
        assert_eq!(speed("offline --pps 7"), Speed::PacketsPerSecond(7.0));
    }

    #[test]
    fn b009_a_mistake_is_named_with_its_line_its_key_and_what_is_allowed() {
        let base = "[online]\nservice = '80-192.0.2.7:80'\nassistant = 'a'\n";
        for (more, says) in [
            ("copies = 'x'", "line 4: copies: invalid value 'x' for '--copies <COPIES>': write a number"),
            (
                "capture = 'x'",
                "line 4: capture: invalid value 'x' for '--capture <HOW>' [possible values: auto, ",
            ),
            ("copes = 2", "line 4: [online] has no key copes; there is copies"),
            ("hold_limit = 2", "line 4: [online] has no key hold_limit; there is hold-limit"),
            ("xyz = 2", "line 4: [online] has no key xyz; its keys are assistant, "),
            ("config = 'x'", "line 4: [online] has no key config"),
            ("check = true", "line 4: [online] has no key check"),
            ("no-wait = 1", "line 4: no-wait: write true or false"),
            ("stats = true", "line 4: stats: write a text or a number, as for --stats <SECONDS> on"),
            ("stats = [1]", "line 4: stats: write a text or a number"),
            ("stats = -1", "line 4: stats: invalid value '-1'"),
            ("stats = 0", "0 is not in 1..=86400"),
            ("stats = 86401", "86401 is not in 1..=86400"),
            ("stats = 1\nstats = 2", "line 5: duplicate key"),
            ("stats = ", "line 4: "),
            ("[onlin]", "line 4: there is no role [onlin]; tables can be online, assistant, offline, record"),
        ] {
            let error = format!("{:#}", parsed(&format!("{base}{more}"), "online").unwrap_err());
            assert!(error.contains(".toml, ") && error.contains(says), "{more}: {error}");
        }
        for (text, typed, says) in [
            ("stats = 1", "online", "line 1: stats is in no table; put it below [online]"),
            ("[assistant]", "online", "there is no table [online]"),
            ("[assistant]\nstats = 86401", "assistant", "86401 is not in 1..=86400"),
            (
                "[offline]\nspeed = 2\nfile = 'a'\nmbps = 1",
                "offline --dry-run -x 80-192.0.2.7:80",
                "line 4: mbps: the argument '--mbps",
            ),
        ] {
            let error = format!("{:#}", parsed(text, typed).unwrap_err());
            assert!(error.contains(says), "{text}: {error}");
        }
        let typed = ["replayer", "online", "--config", "/nowhere/a.toml"].map(OsString::from);
        let error = format!("{:#}", Configuration::parse(typed.into()).unwrap_err());
        assert!(error.contains("/nowhere/a.toml") && error.contains("name a TOML file"), "{error}");
    }

    #[test]
    fn what_is_wrong_on_the_command_line_stays_the_command_lines() {
        let usage = |result: Result<Cli>| result.unwrap_err().downcast::<clap::Error>().unwrap();
        let missing = usage(parsed("[online]\nservice = '80-192.0.2.7:80'", "online"));
        assert_eq!(missing.kind(), clap::error::ErrorKind::MissingRequiredArgument);
        assert!(missing.to_string().contains("--assistant"), "{missing}");
        let wrong = usage(parsed(FILE, "online -n x"));
        assert_eq!(wrong.kind(), clap::error::ErrorKind::ValueValidation);
        assert_eq!(usage(parsed(FILE, "online --help")).kind(), clap::error::ErrorKind::DisplayHelp);
        assert_eq!(usage(parsed(FILE, "top 127.0.0.1:1")).kind(), clap::error::ErrorKind::UnknownArgument);
    }

    /// What SIGHUP takes over, and what it leaves.
    #[test]
    fn b063_a_file_that_is_read_again() {
        let path = std::env::temp_dir().join(format!("replayer-{}-again.toml", std::process::id()));
        let write = |text: &str| {
            std::fs::write(&path, format!("[online]\nservice = '80-192.0.2.7:80'\nassistant = 'a'\n{text}"))
                .unwrap();
        };
        let says = |configuration: &Configuration, key: &str| {
            configuration.settings.get(key).map(|setting| setting.arguments[0].clone())
        };
        write("sample = 10\nstats = 1\nworkers = 1");
        let typed = ["replayer", "online", "--stats", "7", "--config"].map(OsString::from);
        let typed = typed.into_iter().chain([path.clone().into()]).collect();
        let (_, mut configuration) = Configuration::parse(typed).unwrap();
        let live = ["sample", "stats"];
        write("sample = 20\nstats = 2\nworkers = 2\nspread = 5");
        let mut sample = None;
        configuration.reload(&live, |role| {
            let Some(Role::Online(args)) = role else { panic!("{role:?}") };
            sample = Some((args.replay.sample.0, args.replay.stats));
            Ok(())
        });
        // What is typed wins again; what needs a restart is not forgotten.
        assert_eq!(sample, Some((20.0, Some(7))));
        assert_eq!(says(&configuration, "sample").as_deref(), Some("--sample=20"));
        assert_eq!(says(&configuration, "workers").as_deref(), Some("--workers=1"));
        assert_eq!(says(&configuration, "spread"), None);
        for wrong in ["sample = 200", "sampel = 1", "sample = "] {
            write(wrong);
            configuration.reload(&live, |_| panic!("{wrong}"));
            assert_eq!(says(&configuration, "sample").as_deref(), Some("--sample=20"));
        }
        write("sample = 30");
        configuration.reload(&live, |_| bail!("the role cannot"));
        assert_eq!(says(&configuration, "sample").as_deref(), Some("--sample=20"));
        std::fs::remove_file(&path).unwrap();
        configuration.reload(&live, |_| panic!("there is no file"));
    }

    #[test]
    fn the_example_of_the_documentation_is_one() {
        let page = include_str!("../../../docs/operation.md");
        let (_, rest) = page.split_once("```toml\n").unwrap();
        let (example, _) = rest.split_once("```").unwrap();
        let tables: Vec<&str> =
            ROLES.into_iter().filter(|role| example.contains(&format!("[{role}]"))).collect();
        assert_eq!(tables, ROLES, "an example for each role");
        for role in ROLES {
            parsed(example, role).unwrap_or_else(|error| panic!("{role}: {error:#}"));
        }
    }
}
