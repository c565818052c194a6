//! The table of a role in a TOML file, as the arguments that a person would type instead.

use anyhow::{Result, anyhow, bail};
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Command};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// The roles that a file may have tables for.
pub(super) const ROLES: [&str; 4] = ["online", "assistant", "offline", "record"];
/// The flag that names the file, which is no key of it.
pub(super) const CONFIG: &str = "config";

/// By key.
pub type Settings = BTreeMap<String, Setting>;

/// One key of the file.
#[derive(Clone, Debug)]
pub struct Setting {
    pub(super) line: usize,
    /// As they would be typed; none for a flag that is false.
    pub(super) arguments: Vec<String>,
}

/// What is wrong in a file, and where.
pub(super) struct Mistake {
    pub(super) line: usize,
    pub(super) what: String,
}

impl Mistake {
    pub(super) fn of(self, file: &Path) -> anyhow::Error {
        anyhow!("{}, line {}: {}", file.display(), self.line, self.what)
    }
}

/// The settings of the command's table.
pub(super) fn settings(text: &str, command: &Command) -> Result<Settings, Mistake> {
    let line = |at: usize| text[..at].matches('\n').count() + 1;
    let mistake = |at: usize, what: String| Mistake { line: line(at), what };
    let root = DeTable::parse(text)
        .map_err(|error| mistake(error.span().map_or(0, |span| span.start), error.message().to_owned()))?;
    let mut of_role = None;
    for (name, table) in root.get_ref() {
        let (at, name) = (name.span().start, name.get_ref());
        let DeValue::Table(table) = table.get_ref() else {
            return Err(mistake(at, format!("{name} is in no table; put it below [{}]", command.get_name())));
        };
        if !ROLES.contains(&name.as_ref()) {
            return Err(mistake(
                at,
                format!("there is no role [{name}]; tables can be {}", ROLES.join(", ")),
            ));
        }
        if name == command.get_name() {
            of_role = Some(table);
        }
    }
    let Some(table) = of_role else {
        return Err(mistake(0, format!("there is no table [{}] in the file", command.get_name())));
    };
    let mut settings = Settings::new();
    for (key, value) in table {
        let (at, key) = (key.span().start, key.get_ref());
        let named = |argument: &&Arg| argument.get_long() == Some(key) && is_key(argument);
        let argument =
            command.get_arguments().find(named).ok_or_else(|| mistake(at, unknown(command, key)))?;
        let arguments = arguments(argument, key, value.get_ref())
            .map_err(|error| mistake(at, format!("{key}: {error}")))?;
        settings.insert(key.to_string(), Setting { line: line(at), arguments });
    }
    Ok(settings)
}

fn is_key(argument: &Arg) -> bool {
    argument.get_id() != CONFIG
        && !argument.is_hide_set()
        && !matches!(argument.get_action(), ArgAction::Help)
}

/// What a value would be on the command line.
fn arguments(argument: &Arg, key: &str, value: &DeValue<'_>) -> Result<Vec<String>> {
    if matches!(argument.get_action(), ArgAction::SetTrue) {
        return match value {
            DeValue::Boolean(true) => Ok(vec![format!("--{key}")]),
            DeValue::Boolean(false) => Ok(Vec::new()),
            _ => bail!("write true or false"),
        };
    }
    let typed = |value: &dyn Display| vec![format!("--{key}={value}")];
    match value {
        DeValue::String(text) => Ok(typed(text)),
        DeValue::Integer(number) => Ok(typed(number)),
        DeValue::Float(number) => Ok(typed(number)),
        DeValue::Array(list) if argument.get_value_delimiter().is_some() => {
            let each = list.iter().map(|item| match item.get_ref() {
                DeValue::Array(_) => bail!("a list of lists is none"),
                item => arguments(argument, key, item),
            });
            Ok(each.collect::<Result<Vec<_>>>()?.concat())
        }
        _ => bail!("write a text or a number, as for {argument} on the command line"),
    }
}

/// No flag of the role is called that; the nearest one that is, or all.
fn unknown(command: &Command, key: &str) -> String {
    let role = command.get_name();
    let error = command
        .clone()
        .ignore_errors(false)
        .try_get_matches_from([role.to_owned(), format!("--{key}")])
        .err();
    let nearest = error.as_ref().and_then(|error| match error.get(ContextKind::SuggestedArg) {
        Some(ContextValue::String(flag)) => flag.strip_prefix("--"),
        _ => None,
    });
    let keys = || -> BTreeSet<&str> {
        command.get_arguments().filter(|argument| is_key(argument)).filter_map(Arg::get_long).collect()
    };
    match nearest.filter(|nearest| keys().contains(nearest)) {
        Some(nearest) => format!("[{role}] has no key {key}; there is {nearest}"),
        None => format!("[{role}] has no key {key}; its keys are {}", Vec::from_iter(keys()).join(", ")),
    }
}
