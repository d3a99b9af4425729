//! The plugin on a host: its program below `/opt/cni/bin`, its entry in the network configuration.
//!
//! Runtimes use the first file by name in their folder. If that is a list, our entry goes into it;
//! if it is a lone configuration, a list is made from it that comes first by name, and the file stays.
//! Every file is replaced whole (written beside, then renamed), keeps its mode and owner, and is read
//! again just before, so that an edit made meanwhile is not lost.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::PLUGIN;
use super::conflist::{self, Form, Unsuitable};

/// Where runtimes look for network configurations.
pub const CONF_DIR: &str = "/etc/cni/net.d";
/// Where runtimes look for plugins.
pub const BIN_DIR: &str = "/opt/cni/bin";
/// Where runtimes remember what they called for each container.
pub const CACHE_DIR: &str = "/var/lib/cni";

/// A bigger file is no network configuration.
const MAX_FILE: u64 = 1 << 20;
/// Names of lists made from a lone configuration, tried until one comes first by name.
const MADE: [&str; 3] = ["00-ferroute.conflist", "00--ferroute.conflist", "--ferroute.conflist"];
/// Another writer at the same file is given way to this often.
const ATTEMPTS: usize = 5;

/// Why the plugin could not be installed or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("cannot {verb} {path}: {source}; run as root, with the folder mounted writable")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No file could take the plugin.
    #[error(
        "no network configuration in {folder} can take {PLUGIN}{}; install the cluster's pod network first",
        reasons(.skipped)
    )]
    Nowhere {
        /// The folder.
        folder: PathBuf,
        /// Why each file could not.
        skipped: Vec<String>,
    },
    /// No name comes before the file's.
    #[error(
        "{path} is a lone configuration and no list can come before it by name; rename it, for example to 10-pods.conf"
    )]
    NoName {
        /// The lone configuration.
        path: PathBuf,
    },
    /// The first file by name is not complete.
    #[error("{path} is just being written; it is looked at again")]
    Unfinished {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else kept writing.
    #[error(
        "{path} changes all the time; stop the other program that writes it, or put {PLUGIN} into it by hand"
    )]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// Our own program cannot be found.
    #[error("cannot find the program of this process: {0}")]
    NoProgram(io::Error),
    /// The list cannot do without us.
    #[error("{path} {source}")]
    Stays {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Unsuitable,
    },
}

fn reasons(skipped: &[String]) -> String {
    if skipped.is_empty() { " (there is none)".to_owned() } else { format!(": {}", skipped.join("; ")) }
}

/// What `ferroute cni install` is told.
#[derive(Clone, Debug, PartialEq)]
pub struct Install {
    /// Where the network configuration is; `None` leaves it to the daemon (`--cni-conf-dir`).
    pub conf_dir: Option<PathBuf>,
    /// Where plugins are.
    pub bin_dir: PathBuf,
    /// Keys that the entry must have.
    pub settings: Map<String, Value>,
}

/// Program first: an entry without it would stop every pod.
///
/// # Errors
/// What could not be done; what was done before stays.
pub fn install(install: &Install) -> Result<String, Error> {
    let target = install.bin_dir.join(PLUGIN);
    let verb = if install_program(&install.bin_dir)? { "wrote" } else { "unchanged:" };
    let mut text = format!("{verb} {}\n", target.display());
    if let Some(folder) = &install.conf_dir {
        let Configured { path, changed, skipped } = configure(folder, &install.settings)?;
        for file in skipped {
            text.push_str(&format!("passed over {file}\n"));
        }
        let verb = if changed { "put" } else { "unchanged:" };
        text.push_str(&format!("{verb} CNI plugin {PLUGIN} in {}\n", path.display()));
    }
    Ok(text)
}

/// What was taken out, or in a dry run would be.
#[derive(Debug, Default)]
pub struct Uninstalled {
    /// One object per line.
    pub removed: Vec<String>,
    /// What stays, and why.
    pub notes: Vec<String>,
    /// What could not be done.
    pub failures: Vec<String>,
}

impl Uninstalled {
    /// For people.
    pub fn text(&self) -> String {
        let removed = self.removed.iter().map(|object| format!("removed {object}\n"));
        let mut text: String = removed.chain(self.notes.iter().map(|note| format!("{note}\n"))).collect();
        if text.is_empty() && self.failures.is_empty() {
            text = format!("CNI plugin {PLUGIN} is not installed\n");
        }
        text
    }
}

/// Takes the entry out first, then the program: no pod may start with an entry without program.
pub fn uninstall(conf_dir: &Path, bin_dir: &Path, dry_run: bool) -> Uninstalled {
    let (removed, errors) = deconfigure(conf_dir, dry_run);
    let mut outcome = Uninstalled {
        removed,
        notes: Vec::new(),
        failures: errors.iter().map(ToString::to_string).collect(),
    };
    if !outcome.failures.is_empty() {
        return outcome;
    }
    match remove_program(bin_dir, Path::new(CACHE_DIR), dry_run) {
        Ok(Removed::Gone(path)) => outcome.removed.push(format!("file {}", path.display())),
        Ok(Removed::Absent) => {}
        Ok(Removed::InUse(path, count)) => outcome.notes.push(format!(
            "kept {}: {count} containers were started with it, and some runtimes need it to delete them; remove it \
             when they are gone (it does nothing without its entry)",
            path.display()
        )),
        Err(error) => outcome.failures.push(error.to_string()),
    }
    outcome
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { verb, path: path.to_owned(), source }
}

/// Where the entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configured {
    /// The file that runtimes use.
    pub path: PathBuf,
    /// Whether it had to be written.
    pub changed: bool,
    /// Files that come before it by name and cannot take the plugin, each with the reason.
    pub skipped: Vec<String>,
}

/// Puts the entry into the network configuration that runtimes use, if it is not there. `settings`
/// are keys that the entry must have; others are left as they are.
///
/// # Errors
/// When no file can take it, or the system refuses.
pub fn configure(folder: &Path, settings: &Map<String, Value>) -> Result<Configured, Error> {
    let mut skipped = Vec::new();
    let mut made_before = Vec::new();
    for path in configurations(folder)? {
        let Some(text) = read(&path)? else { continue };
        let form = match conflist::examine(&text) {
            Ok(form) => form,
            // Its writer is at work: whichever comes next by name is not what runtimes will use.
            Err(Unsuitable::Form(_)) if was_just_written(&path) => {
                return Err(Error::Unfinished { path });
            }
            Err(why) => {
                skipped.push(format!("{} {why}", file_name(&path)));
                continue;
            }
        };
        match form {
            Form::MadeFrom(_) => made_before.push(path),
            Form::List => {
                let changed = rewrite(&path, |text| conflist::insert(text, settings))?;
                // Lists made from a configuration that is not the first any more.
                made_before.iter().try_for_each(|made| remove_file(made))?;
                return Ok(Configured { path, changed, skipped });
            }
            Form::Single => {
                let source = file_name(&path);
                let name = MADE.iter().find(|name| ***name < *source);
                let name = name.ok_or_else(|| Error::NoName { path: path.clone() })?;
                let made = folder.join(name);
                let list = conflist::list_from_single(&text, &source, settings);
                let list = list.map_err(|source| Error::Stays { path: path.clone(), source })?;
                for other in made_before.iter().filter(|other| **other != made) {
                    remove_file(other)?;
                }
                let changed = read(&made)?.as_ref() != Some(&list);
                if changed {
                    // As readable as the file it stands in for.
                    write(&made, list.as_bytes(), &fs::metadata(&path).map_err(failed("read", &path))?)?;
                }
                return Ok(Configured { path: made, changed, skipped });
            }
        }
    }
    // Nothing left to stand in for.
    made_before.iter().try_for_each(|made| remove_file(made))?;
    Err(Error::Nowhere { folder: folder.to_owned(), skipped })
}

/// Takes the entry out of every network configuration in the folder; what was done or, in a dry run,
/// would be, one line per file.
///
/// # Errors
/// One per file that could not be changed; the others still are.
pub fn deconfigure(folder: &Path, dry_run: bool) -> (Vec<String>, Vec<Error>) {
    let (mut done, mut errors) = (Vec::new(), Vec::new());
    let paths = match configurations(folder) {
        Ok(paths) => paths,
        Err(error) => return (done, vec![error]),
    };
    for path in paths {
        match take_out(&path, dry_run) {
            Ok(Some(line)) => done.push(line),
            Ok(None) => {}
            Err(error) => errors.push(error),
        }
    }
    (done, errors)
}

fn take_out(path: &Path, dry_run: bool) -> Result<Option<String>, Error> {
    let Some(text) = read(path)? else { return Ok(None) };
    if matches!(conflist::examine(&text), Ok(Form::MadeFrom(_))) {
        if !dry_run {
            remove_file(path)?;
        }
        return Ok(Some(format!("file {}", path.display())));
    }
    if !conflist::contains(&text) {
        return Ok(None);
    }
    if !dry_run {
        rewrite(path, conflist::remove)?;
    }
    Ok(Some(format!("CNI plugin {PLUGIN} from {}", path.display())))
}

/// Copies the program of this process to where runtimes find it; whether that was needed.
///
/// # Errors
/// When the system refuses.
pub fn install_program(folder: &Path) -> Result<bool, Error> {
    let own = std::env::current_exe().map_err(Error::NoProgram)?;
    copy_program(&own, folder)
}

fn copy_program(own: &Path, folder: &Path) -> Result<bool, Error> {
    fs::create_dir_all(folder).map_err(failed("create", folder))?;
    let target = folder.join(PLUGIN);
    if has_same_content(own, &target).unwrap_or(false) {
        return Ok(false);
    }
    let temporary = folder.join(format!(".{PLUGIN}.{}", std::process::id()));
    let outcome = (|| {
        let mut from = File::open(own).map_err(failed("read", own))?;
        let mut to = File::create(&temporary).map_err(failed("write", &temporary))?;
        io::copy(&mut from, &mut to).map_err(failed("write", &temporary))?;
        to.set_permissions(Permissions::from_mode(0o755)).map_err(failed("make executable", &temporary))?;
        to.sync_all().map_err(failed("write", &temporary))?;
        // Open for writing it could not be run.
        drop(to);
        fs::rename(&temporary, &target).map_err(failed("write", &target))
    })();
    if outcome.is_err() {
        // Best effort: the first error is the one to tell.
        let _ = fs::remove_file(&temporary);
    }
    outcome.map(|()| true)
}

fn has_same_content(one: &Path, other: &Path) -> io::Result<bool> {
    let known = fs::metadata(other)?;
    if fs::metadata(one)?.len() != known.len() || known.mode() & 0o777 != 0o755 {
        return Ok(false);
    }
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let count = one.read(&mut left)?;
        if count == 0 {
            return Ok(true);
        }
        other.read_exact(&mut right[..count])?;
        if left[..count] != right[..count] {
            return Ok(false);
        }
    }
}

/// What became of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removed {
    /// It is gone, or in a dry run would be.
    Gone(PathBuf),
    /// It was not there.
    Absent,
    /// This many containers were started with it. Some runtimes call for a container's end what they
    /// called for its start: without the program they could not delete it.
    InUse(PathBuf, usize),
}

/// Removes the program, unless containers that were started with it are still there.
///
/// # Errors
/// When the system refuses.
pub fn remove_program(folder: &Path, cache: &Path, dry_run: bool) -> Result<Removed, Error> {
    let path = folder.join(PLUGIN);
    if !path.exists() {
        return Ok(Removed::Absent);
    }
    let users = containers_with_plugin(&cache.join("results"));
    if users > 0 {
        return Ok(Removed::InUse(path, users));
    }
    if !dry_run {
        remove_file(&path)?;
    }
    Ok(Removed::Gone(path))
}

/// libcni keeps a file per attachment; the list it used is in it as base64.
fn containers_with_plugin(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| was_made_with_plugin(&entry.path()).unwrap_or(false)).count()
}

fn was_made_with_plugin(path: &Path) -> Option<bool> {
    let text = read(path).ok()??;
    let cached: Value = serde_json::from_str(&text).ok()?;
    let list = STANDARD.decode(cached.get("config")?.as_str()?).ok()?;
    Some(conflist::contains(std::str::from_utf8(&list).ok()?))
}

/// Files that runtimes read, in their order. A folder that is not there has none.
fn configurations(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("read", folder)(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed("read", folder))?.path();
        let is_read = path.extension().is_some_and(|end| end == "conf" || end == "conflist" || end == "json");
        if is_read && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// A file that does not parse may be half written for this long.
const GROWING: Duration = Duration::from_secs(2);

fn was_just_written(path: &Path) -> bool {
    let modified = fs::metadata(path).and_then(|known| known.modified());
    // A time in the future says nothing.
    modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age < GROWING))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The text of a file; `None` when it is gone. What is not UTF-8 is no JSON either.
fn read(path: &Path) -> Result<Option<String>, Error> {
    let outcome = File::open(path).and_then(|file| {
        let mut bytes = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    match outcome {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

/// Replaces a file's text; whether that was needed.
pub(crate) fn rewrite(
    path: &Path,
    edit: impl Fn(&str) -> Result<Option<String>, Unsuitable>,
) -> Result<bool, Error> {
    // Behind a link is the file that its owner writes.
    let path = &fs::canonicalize(path).map_err(failed("read", path))?;
    for _ in 0..ATTEMPTS {
        let Some(before) = read(path)? else { return Ok(false) };
        let known = fs::metadata(path).map_err(failed("read", path))?;
        let edited = edit(&before).map_err(|source| Error::Stays { path: path.clone(), source })?;
        let Some(after) = edited else { return Ok(false) };
        let temporary = prepare(path, after.as_bytes(), &known)?;
        // Somebody may have written since; the rename must not undo that.
        if read(path)?.as_deref() == Some(&before) {
            return put(&temporary, path).map(|()| true);
        }
        let _ = fs::remove_file(&temporary);
    }
    Err(Error::Busy { path: path.clone() })
}

fn write(path: &Path, content: &[u8], like: &fs::Metadata) -> Result<(), Error> {
    put(&prepare(path, content, like)?, path)
}

/// The content in a file beside, complete on disk, under a name that runtimes do not read.
fn prepare(path: &Path, content: &[u8], like: &fs::Metadata) -> Result<PathBuf, Error> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let temporary = folder.join(format!(".{}.{}.ferroute", file_name(path), std::process::id()));
    let outcome = (|| {
        let mut file = File::create(&temporary)?;
        file.set_permissions(Permissions::from_mode(like.mode() & 0o7777))?;
        fchown(&file, Some(like.uid()), Some(like.gid()))?;
        file.write_all(content)?;
        file.sync_all()
    })();
    match outcome {
        Ok(()) => Ok(temporary),
        Err(error) => {
            let _ = fs::remove_file(&temporary);
            Err(failed("write", &temporary)(error))
        }
    }
}

fn put(temporary: &Path, path: &Path) -> Result<(), Error> {
    fs::rename(temporary, path).map_err(|error| {
        let _ = fs::remove_file(temporary);
        failed("write", path)(error)
    })?;
    // The rename itself survives a power cut only when the folder is on disk; pods of that moment are
    // gone anyway, so a refusal is not worth failing for.
    if let Some(folder) = path.parent().and_then(|folder| File::open(folder).ok()) {
        let _ = folder.sync_all();
    }
    Ok(())
}

fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
