//! From the words of a command line to one value per flag, by pflag's rules: booleans alone or
//! with `=`, repeated scalars (the last wins), lists by comma or repetition, `-v=2`, `-v 2`.

use std::collections::BTreeMap;
use std::ffi::OsString;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches};

use super::Mistake;
use super::flags::{DEPRECATED, FLAGS, Flag, Kind, REMOVED, find};

/// Values of one command line, with what was written explicitly.
#[derive(Debug, Default)]
pub(super) struct Given {
    values: BTreeMap<&'static str, Value>,
    /// Deprecated flags in use, as whole sentences.
    pub(super) warnings: Vec<String>,
}

#[derive(Debug)]
struct Value {
    /// One item per use; each as written.
    items: Vec<String>,
    explicit: bool,
}

/// Why there are no values.
#[derive(Debug)]
pub(super) enum Stop {
    /// Text for standard output; not an error.
    Print(String),
    /// What to print on standard error.
    Wrong(Vec<Mistake>),
}

impl Given {
    /// Whether the user wrote the flag.
    pub(super) fn is_explicit(&self, name: &str) -> bool {
        self.values.get(name).is_some_and(|value| value.explicit)
    }

    /// The value as written; the last one wins. Empty when the flag has no default.
    pub(super) fn text(&self, name: &str) -> &str {
        self.values.get(name).and_then(|value| value.items.last()).map_or("", String::as_str)
    }

    /// The items of a list, trimmed, blank ones kept; a use without value adds nothing.
    pub(super) fn list(&self, name: &str) -> Vec<&str> {
        let Some(value) = self.values.get(name) else { return Vec::new() };
        value
            .items
            .iter()
            .filter(|item| !item.trim().is_empty())
            .flat_map(|item| item.split(','))
            .map(|item| item.trim().trim_matches('"').trim())
            .collect()
    }
}

/// Reads the words behind the program's name (and behind the subcommand's, if `program` names one).
/// `extra` are arguments beside the flag table; their values come back under their ids.
pub(super) fn read(
    program: &'static str,
    about: &'static str,
    flags: impl Fn(&Flag) -> bool,
    extra: &[Flag],
    words: Vec<OsString>,
) -> Result<Given, Stop> {
    let wrong = one_dash(&words);
    if !wrong.is_empty() {
        return Err(Stop::Wrong(wrong));
    }
    let flags: Vec<Flag> = FLAGS.iter().filter(|flag| flags(flag)).chain(extra).copied().collect();
    let mut command = clap::Command::new(program)
        .about(about)
        .no_binary_name(true)
        .args_override_self(true)
        .disable_version_flag(true)
        .disable_help_flag(true)
        .term_width(110)
        .arg(
            Arg::new("help")
                .long("help")
                .short('h')
                .help("Print this help")
                .help_heading("Process, API access, health, metrics, logs")
                .action(ArgAction::SetTrue),
        )
        .arg(
            Arg::new("version")
                .long("version")
                .short('V')
                .help("Print the version")
                .help_heading("Process, API access, health, metrics, logs")
                .action(ArgAction::SetTrue),
        )
        .arg(Arg::new("stray").num_args(0..).action(ArgAction::Append).hide(true));
    for flag in &flags {
        command = command.arg(argument(flag));
    }
    for (name, _) in DEPRECATED.iter().chain(REMOVED) {
        // Optional values, so that the advice comes whatever follows the flag.
        let kind = Arg::new(*name).long(*name).hide(true).action(ArgAction::Append);
        command = command.arg(kind.num_args(0..=1).default_missing_value(""));
    }
    let matches = match command.try_get_matches_from_mut(&words) {
        Ok(matches) => matches,
        Err(error) => return Err(Stop::Wrong(vec![Mistake::usage(plain(&error))])),
    };
    if matches.get_flag("help") {
        return Err(Stop::Print(command.render_help().to_string()));
    }
    if matches.get_flag("version") {
        return Err(Stop::Print(format!("ferroute {}\n", env!("CARGO_PKG_VERSION"))));
    }
    let mut wrong = Vec::new();
    for (name, advice) in REMOVED {
        if is_explicit(&matches, name) {
            wrong.push(Mistake::usage(format!("--{name} {advice}")));
        }
    }
    wrong.extend(strays(&matches, &words));
    if !wrong.is_empty() {
        return Err(Stop::Wrong(wrong));
    }
    let mut given = Given::default();
    for (name, what) in DEPRECATED {
        if is_explicit(&matches, name) {
            given.warnings.push(format!("--{name} is deprecated and {what}; remove it"));
        }
    }
    for flag in &flags {
        let explicit = is_explicit(&matches, flag.name);
        let items = matches.get_many::<String>(flag.name).into_iter().flatten().cloned().collect();
        given.values.insert(flag.name, Value { items, explicit });
    }
    Ok(given)
}

fn is_explicit(matches: &ArgMatches, name: &str) -> bool {
    matches.value_source(name) == Some(ValueSource::CommandLine)
}

fn argument(flag: &Flag) -> Arg {
    let arg = Arg::new(flag.name).long(flag.name).help(flag.help).help_heading(flag.room.heading());
    let arg = if flag.default.is_empty() { arg } else { arg.default_value(flag.default) };
    let arg = match flag.name {
        "v" => arg.short('v'),
        "output" => arg.short('o'),
        _ => arg,
    };
    match flag.kind {
        Kind::Switch => arg
            .action(ArgAction::Set)
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_name("BOOL"),
        Kind::Duration => arg.action(ArgAction::Set).allow_hyphen_values(true).value_name("DURATION"),
        Kind::Number(_) => arg.action(ArgAction::Set).allow_negative_numbers(true).value_name("NUMBER"),
        Kind::Text => arg.action(ArgAction::Set).allow_negative_numbers(true).value_name("TEXT"),
        Kind::List => arg.action(ArgAction::Append).allow_negative_numbers(true).value_name("LIST"),
    }
}

/// clap's message without its usage block: the flags are many and `--help` shows them.
fn plain(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    text.split("\n\nUsage:").next().unwrap_or(text).trim().to_owned()
}

/// Long flags written with one dash, as very old manifests do.
fn one_dash(words: &[OsString]) -> Vec<Mistake> {
    let mut wrong = Vec::new();
    for word in words.iter().filter_map(|word| word.to_str()) {
        if word == "--" {
            break;
        }
        let Some(rest) = word.strip_prefix('-').filter(|rest| !rest.starts_with('-')) else { continue };
        let name = rest.split('=').next().unwrap_or(rest);
        let known = name.len() > 1
            && (find(name).is_some()
                || ["help", "version", "output"].contains(&name)
                || DEPRECATED.iter().chain(REMOVED).any(|(known, _)| *known == name));
        if known {
            wrong.push(Mistake::usage(format!("-{name}: long flags take two dashes; write --{name}")));
        }
    }
    wrong
}

/// Words that belong to no flag.
fn strays(matches: &ArgMatches, words: &[OsString]) -> Vec<Mistake> {
    let strays: Vec<&String> = matches.get_many("stray").into_iter().flatten().collect();
    let mut wrong = Vec::new();
    if !strays.is_empty() && is_explicit(matches, "peer-router-passwords") {
        // Never echo what may be a secret.
        return vec![Mistake::usage(
            "unexpected arguments; join the items of --peer-router-passwords with commas, and write --flag=value",
        )];
    }
    for stray in strays {
        let at = words.iter().position(|word| word.to_str() == Some(stray));
        let before = at
            .and_then(|at| at.checked_sub(1))
            .and_then(|at| words.get(at))
            .and_then(|word| word.to_str())
            .and_then(|word| word.strip_prefix("--"));
        wrong.push(Mistake::usage(match before.map(|name| (name, find(name))) {
            Some((name, Some(flag))) if flag.kind == Kind::Switch => {
                format!("unexpected argument {stray:?}: a boolean takes its value with '='; write --{name}={stray}")
            }
            _ if ["status", "plan"].contains(&stray.as_str()) => {
                format!("{stray:?} must be the first word: ferroute {stray} [FLAGS]")
            }
            _ => format!("unexpected argument {stray:?}; every value belongs to a flag, as in --flag=value"),
        }));
    }
    wrong
}
