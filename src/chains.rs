//! A room's chains in the kernel: one iptables command per family, and what is known to be there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{self, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ferroute_iptables::{
    ChainChanges, ChainName, Command, Error, Family, Found, Ours, Plan, PlanError, Removal, Ruleset,
    TableName, Variant, plan, plan_chains, remove,
};

use crate::cleanup::Cleanup;
use crate::disturbance::{self, Disturbance};
use crate::host::events::Watching;

/// Chains and jumps by family and table.
pub type Rules = BTreeMap<(Family, TableName), Ruleset>;

/// Writes of chains by any room of this process. The kernel tells nobody that rules moved; a room
/// whose jump must stay first looks again when another one wrote, instead of at its next audit.
static WRITES: AtomicU64 = AtomicU64::new(0);

/// How often any room of this process wrote chains.
pub fn writes() -> u64 {
    WRITES.load(Ordering::Acquire)
}

/// One room of this process writes at a time: two that wait for the same lock only make each other late.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// [`turn`], unless another room has it.
fn turn_now() -> Option<MutexGuard<'static, ()>> {
    match TURN.try_lock() {
        Ok(turn) => Some(turn),
        Err(sync::TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
        Err(sync::TryLockError::WouldBlock) => None,
    }
}

/// `XT_LOCK_NAME` of iptables: who writes by the legacy variant holds it (flock(2)).
pub const LOCK: &str = "/run/xtables.lock";
/// Seconds to stand in the queue for the lock. Short: what needs no chain shall not wait with it. The
/// kernel's queue is fair, so whoever takes the lock again and again lets us through.
const QUEUE: u32 = 1;
/// After that, a look at the lock replaces standing in the queue for so long.
const LOOK_ONLY: Duration = Duration::from_secs(2);

/// The lock of the legacy variant, looked at without opening the file again: that would seem a write to
/// whoever watches it.
#[derive(Debug, Default)]
struct Lock {
    file: Option<File>,
}

impl Lock {
    /// Whether another program holds it now.
    fn is_held(&mut self) -> bool {
        if self.file.is_none() {
            self.file = File::open(LOCK).ok();
        }
        let Some(file) = &self.file else { return false };
        match file.try_lock() {
            Ok(()) => {
                // Closing would free it too.
                let _ = file.unlock();
                false
            }
            Err(TryLockError::WouldBlock) => true,
            // Then the program finds out.
            Err(TryLockError::Error(_)) => false,
        }
    }
}

/// A lock that was not to be had.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    since: Instant,
    /// When to stand in the queue again, if no look finds it free before.
    queue_at: Instant,
}

/// Reads and writes the chains that one room owns.
pub struct Chains {
    commands: BTreeMap<Family, Command>,
    ours: Ours,
    /// What was written or found right last, to know a change of ours from none without reading.
    known: BTreeMap<(Family, TableName), Ruleset>,
    /// The same tables as the kernel holds them, for changes of single chains.
    found: BTreeMap<(Family, TableName), Found>,
    runs: Vec<Run>,
    lock: Lock,
    waiting: Option<Waiting>,
    /// Chains of ours that stay as they are.
    kept: BTreeSet<ChainName>,
    /// What the choice of the programs listed, good until somebody writes rules.
    listings: BTreeMap<Family, String>,
    /// Per variant in use, whether a stranger may have written rules.
    disturbances: BTreeMap<Variant, Disturbance>,
    /// [`writes`] when that was last settled.
    settled_writes: u64,
}

/// One run of a program, for metrics.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Of which family.
    pub family: Family,
    /// Whether it wrote (restore) or read (save).
    pub wrote: bool,
    /// How long it took.
    pub time: Duration,
}

impl Chains {
    /// Chooses the variant of iptables the host uses, per family; `prefixes` say which chains are
    /// ours. A family whose programs are missing or do not work is dropped from `families`, but
    /// IPv4 must work.
    pub fn open(
        families: &mut Vec<Family>,
        prefixes: impl IntoIterator<Item = &'static str>,
    ) -> Result<Self, Error> {
        let mut commands = BTreeMap::new();
        let mut listings = BTreeMap::new();
        // Before reading, so that what is written meanwhile is seen.
        let mut early =
            [Variant::Nft, Variant::Legacy].map(|variant| (variant, Disturbance::open_existing(variant)));
        let settled_writes = writes();
        let mut all_probed = true;
        for family in families.clone() {
            match Command::detect(family, None) {
                Ok(found) => {
                    tracing::info!(
                        ?family, variant = %found.command.variant(), reason = ?found.reason,
                        passed_over = ?found.passed_over, "iptables chosen"
                    );
                    if let Some(mixed) = found.mixed {
                        tracing::warn!(
                            ?family, variant = %found.command.variant(), other = %mixed.other, rules = mixed.rules,
                            "this host has rules in both variants of iptables; packets meet both, programs see one"
                        );
                    }
                    all_probed &= found.probed;
                    listings.insert(family, found.listing);
                    commands.insert(family, found.command.with_lock_wait(QUEUE));
                }
                Err(error) if family == Family::V6 => {
                    tracing::warn!(%error, "IPv6 is not served");
                    families.retain(|kept| *kept != family);
                }
                Err(error) => return Err(error),
            }
        }
        let used: BTreeSet<Variant> = commands.values().map(Command::variant).collect();
        let mut disturbances: BTreeMap<Variant, Disturbance> = used
            .into_iter()
            .map(|variant| {
                let early =
                    early.iter_mut().find(|(of, _)| *of == variant).and_then(|(_, watch)| watch.take());
                (variant, early.unwrap_or_else(|| Disturbance::open(variant)))
            })
            .collect();
        if all_probed {
            // Who disturbed was the probe: where no table is, none of ours is in it.
            disturbances.values_mut().for_each(Disturbance::settle);
        }
        Ok(Self {
            commands,
            ours: Ours::new(prefixes),
            known: BTreeMap::new(),
            found: BTreeMap::new(),
            runs: Vec::new(),
            lock: Lock::default(),
            waiting: None,
            kept: BTreeSet::new(),
            listings,
            disturbances,
            settled_writes,
        })
    }

    /// Whether another program may have written rules since [`Chains::begin_check`]. Cheap.
    pub fn is_disturbed(&mut self) -> bool {
        let Some(_turn) = turn_now() else {
            // A room of this process writes. It stays seen until that is over.
            return false;
        };
        self.pass_over_rooms();
        self.disturbances.values_mut().any(Disturbance::is_seen)
    }

    /// All chains are read next: what others wrote so far is seen by that, and what they write from now on
    /// will be told by [`Chains::is_disturbed`].
    pub fn begin_check(&mut self) {
        let _turn = turn();
        self.settled_writes = writes();
        self.disturbances.values_mut().for_each(Disturbance::settle);
    }

    /// Takes what other rooms of this process wrote for no stranger's doing. To be called in turn.
    fn pass_over_rooms(&mut self) {
        if writes() != self.settled_writes {
            self.settled_writes = writes();
            self.disturbances.values_mut().for_each(Disturbance::pass_over);
        }
    }

    /// Runs in turn what writes chains of a family; it tells how many tables it wrote.
    fn write_in_turn<T>(&mut self, family: Family, write: impl FnOnce(&mut Self) -> (T, usize)) -> T {
        let _turn = turn();
        self.pass_over_rooms();
        let variant = self.variant(family);
        let watch = |chains: &mut Self, tell: &dyn Fn(&mut Disturbance)| {
            variant.and_then(|variant| chains.disturbances.get_mut(&variant)).into_iter().for_each(tell);
        };
        watch(self, &Disturbance::begin_write);
        let (outcome, tables) = write(self);
        watch(self, &|disturbance| disturbance.end_write(tables));
        // In turn, so that no room takes it for a stranger's doing.
        WRITES.fetch_add(tables as u64, Ordering::AcqRel);
        self.settled_writes = writes();
        outcome
    }

    /// Calls `wake` whenever a program of the legacy variant has run, from a thread of its own that ends
    /// when what is returned is dropped. `None` where nothing tells so: the nft variant's changes are found by
    /// [`Chains::is_disturbed`] alone.
    pub fn watch(&self, wake: impl Fn() + Send + 'static) -> Option<Watching> {
        let legacy = self.commands.values().any(|command| command.variant() == Variant::Legacy);
        legacy.then(|| disturbance::watch(wake)).flatten()
    }

    /// Whether IPv4's rules are written by the nft variant.
    pub fn uses_nft(&self) -> bool {
        self.commands.values().next().is_some_and(|command| command.variant() == Variant::Nft)
    }

    /// Makes the chains right; returns how many tables were not. With `check` they are read back,
    /// else only tables whose rules changed since the last call are looked at. One table that
    /// fails does not keep the others from being written.
    pub fn sync(&mut self, wanted: Rules, check: bool) -> Result<usize, Error> {
        if !self.listings.is_empty() && self.is_disturbed() {
            self.listings.clear();
        }
        if check && self.listings.is_empty() {
            self.begin_check();
        }
        let mut repaired = 0;
        let mut failure = None;
        let mut families: BTreeMap<Family, Vec<(TableName, Ruleset)>> = BTreeMap::new();
        for (key, ruleset) in wanted {
            if check || self.known.get(&key) != Some(&ruleset) {
                families.entry(key.0).or_default().push((key.1, ruleset));
            }
        }
        for (family, tables) in families {
            let Some(command) = self.commands.get(&family).cloned() else { continue };
            // Good once.
            let listing = self.listings.remove(&family);
            // One lock for both families: who waited for it once need not wait again.
            if let Err(error) = self.locked_out(family) {
                tables.iter().for_each(|(table, _)| drop(self.known.remove(&(family, *table))));
                failure = Some(error);
                continue;
            }
            // Programs are dear, so one reads and one writes all tables of a family.
            let results = self.write_in_turn(family, |chains| {
                let results = match listing {
                    Some(listing) => command.sync_tables_from(&listing, &chains.ours, &tables),
                    None => command.sync_tables(&chains.ours, &tables),
                };
                let wrote = results.iter().flatten().filter(|plan| !plan.is_empty()).count();
                (results, wrote)
            });
            if let Some(one) = results.iter().find(|one| one.is_err()).or(results.first()) {
                self.note_lock(one);
            }
            for ((table, ruleset), result) in tables.into_iter().zip(results) {
                match result {
                    Ok(plan) => {
                        if !plan.is_empty() {
                            repaired += 1;
                            tracing::info!(?family, %table, changes = ?plan.describe(), "iptables written");
                        }
                        self.known.insert((family, table), ruleset);
                    }
                    Err(error) => {
                        self.known.remove(&(family, table));
                        tracing::warn!(?family, %table, %error, "iptables refused");
                        failure = Some(error);
                    }
                }
            }
        }
        failure.map_or(Ok(repaired), Err)
    }

    /// What [`Chains::sync`] would write, one line each.
    pub fn difference(&self, wanted: &Rules) -> Result<Vec<String>, Error> {
        let mut lines = Vec::new();
        for ((family, table), ruleset) in wanted {
            let Some(command) = self.commands.get(family) else { continue };
            let plan = command.compare(*table, &self.ours, ruleset)?;
            lines.extend(plan.describe().into_iter().map(|line| format!("{family} {table}: {line}")));
        }
        Ok(lines)
    }

    /// Leaves these chains as they are, though nothing wanted names them as its own.
    pub fn keep(&mut self, chains: BTreeSet<ChainName>) {
        self.kept = chains;
        self.found.clear();
    }

    /// What a table holds that may be changed.
    fn without_kept(&self, mut found: Found) -> Found {
        found.chains.retain(|chain, _| !self.kept.contains(chain));
        found
    }

    /// Since when another program holds the lock that these chains wait for.
    pub fn waits_since(&self) -> Option<Instant> {
        self.waiting.map(|waiting| waiting.since)
    }

    /// Whether a write has a chance: nobody holds the lock, or it is time to stand in the queue for it.
    /// Cheap.
    pub fn may_write(&mut self) -> bool {
        self.waiting.is_none_or(|waiting| waiting.queue_at <= Instant::now()) || !self.lock.is_held()
    }

    /// The refusal of a write that need not be tried.
    fn locked_out(&mut self, family: Family) -> Result<(), Error> {
        let since = self.waits_since();
        match since {
            Some(since) if !self.may_write() => Err(Error::Locked {
                program: format!("{family} restore"),
                seconds: u32::try_from(since.elapsed().as_secs()).unwrap_or(u32::MAX),
            }),
            _ => Ok(()),
        }
    }

    /// Notes what became of a write.
    fn note_lock<T>(&mut self, outcome: &Result<T, Error>) {
        match outcome {
            Err(Error::Locked { .. }) => {
                let now = Instant::now();
                let since = self.waits_since().unwrap_or(now);
                self.waiting = Some(Waiting { since, queue_at: now + LOOK_ONLY });
            }
            _ => self.waiting = None,
        }
    }

    /// Reads one table back and makes it hold what is wanted, in one atomic step.
    pub fn settle(&mut self, family: Family, table: TableName, wanted: &Ruleset) -> Result<Plan, Error> {
        let Some(command) = self.commands.get(&family) else { return Ok(Plan::default()) };
        self.found.remove(&(family, table));
        let found = timed(&mut self.runs, family, false, || command.read(table, &self.ours))?;
        let found = self.without_kept(found);
        let plan = plan(&found, wanted, &self.ours, family)?;
        self.write(family, table, found, plan)
    }

    /// Changes single chains of one table, in one atomic step. Nothing is read: what the last
    /// [`Chains::settle`] found and what was written since counts, and the next one finds out
    /// whether a stranger interfered. After a failure the table is read first.
    pub fn change(
        &mut self,
        family: Family,
        table: TableName,
        changes: &ChainChanges,
    ) -> Result<Plan, Error> {
        let Some(command) = self.commands.get(&family) else { return Ok(Plan::default()) };
        let found = match self.found.remove(&(family, table)) {
            Some(found) => found,
            None => timed(&mut self.runs, family, false, || command.read(table, &self.ours))?,
        };
        let plan = plan_chains(&found, changes, &self.ours, family)?;
        self.write(family, table, found, plan)
    }

    fn write(
        &mut self,
        family: Family,
        table: TableName,
        mut found: Found,
        plan: Plan,
    ) -> Result<Plan, Error> {
        if !plan.is_empty() {
            let outcome = self.locked_out(family).and_then(|()| {
                let Some(command) = self.commands.get(&family).cloned() else { return Ok(()) };
                let outcome = self.write_in_turn(family, |chains| {
                    let outcome = timed(&mut chains.runs, family, true, || command.write(table, &plan));
                    let wrote = usize::from(outcome.is_ok());
                    (outcome, wrote)
                });
                self.note_lock(&outcome);
                outcome
            });
            if let Err(error) = outcome {
                if matches!(error, Error::Locked { .. }) {
                    // Nothing was written: what was read still counts.
                    self.found.insert((family, table), found);
                }
                return Err(error);
            }
        }
        found.note(&plan);
        self.found.insert((family, table), found);
        Ok(plan)
    }

    /// What would make a table that was read hold what is wanted.
    pub fn plan(&self, found: &Found, wanted: &Ruleset, family: Family) -> Result<Plan, PlanError> {
        plan(&self.without_kept(found.clone()), wanted, &self.ours, family)
    }

    /// Whether a chain was in the kernel when its table was last read or written.
    pub fn is_known(&self, family: Family, table: TableName, chain: ChainName) -> bool {
        self.found.get(&(family, table)).is_some_and(|found| found.chains.contains_key(&chain))
    }

    /// The runs of programs since this was last asked.
    pub fn take_runs(&mut self) -> Vec<Run> {
        std::mem::take(&mut self.runs)
    }

    /// What one table holds of ours now.
    pub fn read(&self, family: Family, table: TableName) -> Result<Found, Error> {
        self.commands.get(&family).map_or(Ok(Found::default()), |command| command.read(table, &self.ours))
    }

    /// The variant in use for a family.
    pub fn variant(&self, family: Family) -> Option<Variant> {
        self.commands.get(&family).map(Command::variant)
    }

    /// Removes the chains and the jumps to them.
    pub fn remove(&mut self, dry_run: bool) -> Removal {
        self.known.clear();
        self.found.clear();
        self.listings.clear();
        let commands: Vec<Command> = self.commands.values().cloned().collect();
        remove(&commands, &self.ours, None, dry_run)
    }
}

fn timed<T>(
    runs: &mut Vec<Run>,
    family: Family,
    wrote: bool,
    run: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let started = Instant::now();
    let outcome = run();
    runs.push(Run { family, wrote, time: started.elapsed() });
    outcome
}

/// Takes chains of ours and the jumps to them out of every table, in both variants: the host may
/// have been switched since. Lines say what was removed, or would be, and what stays and why.
pub fn remove_everywhere(prefixes: &[&str], dry_run: bool, cleanup: &mut Cleanup) {
    let mut commands = Vec::new();
    for family in Family::BOTH {
        let (works, fails): (Vec<_>, Vec<_>) = [Variant::Nft, Variant::Legacy]
            .map(|variant| {
                Command::new(family, variant).and_then(|command| command.check().map(|()| command))
            })
            .into_iter()
            .partition(Result::is_ok);
        if works.is_empty() {
            cleanup.failures.extend(fails.into_iter().filter_map(Result::err).map(|error| error.to_string()));
        }
        commands.extend(works.into_iter().filter_map(Result::ok));
    }
    let removal = remove(&commands, &Ours::new(prefixes.iter().copied()), None, dry_run);
    // The list says what is removed, so the verb is said once.
    let object =
        |line: String| line.replace(": remove jump ", ": jump in ").replace(": delete chain ", ": chain ");
    cleanup.removed.extend(removal.removed.into_iter().map(object));
    cleanup.failures.extend(removal.failed);
}
