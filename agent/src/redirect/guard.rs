//! Keeps rules as they are wanted, in many network namespaces, for as long as it runs.
//!
//! The kernel tells of every change; what was changed is compared with what is wanted and, when it
//! differs, installed again. A namespace that goes is let go; one that comes under the same name gets
//! the rules anew. One thread does it all, and sleeps while nothing happens.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::apply::{dropped, listen};
use super::dns;
use super::report::{Report, Standing};
use super::{
    Backend, BackendChoice, Namespace, Probe, Redirect, RedirectError, Verdict, apply, probe,
    remove, verify,
};
use crate::netlink::Netlink;

/// How often namespaces are looked for, and new wishes.
const LOOK: Duration = Duration::from_millis(250);
/// How often what is in force is compared though nothing was told.
const COMPARE: Duration = Duration::from_secs(30);
/// How often it is where the kernel tells nothing: the older iptables.
const COMPARE_SILENT: Duration = Duration::from_millis(500);
/// The shortest time between two repairs of a namespace, so that a fight with somebody who changes
/// the rules back costs little.
const BETWEEN_REPAIRS: Duration = Duration::from_millis(100);
/// How often rules are installed before it counts as a failure that they are not there.
const ATTEMPTS: usize = 3;
/// How often it is tried whether traffic is really handed over, and how often when it was not.
const PROBE: Duration = Duration::from_secs(30);
const PROBE_AGAIN: Duration = Duration::from_secs(1);
/// How often it is read how much strict rules have dropped.
const COUNT: Duration = Duration::from_secs(2);
/// How often that is told, at most.
const TELL: Duration = Duration::from_secs(60);
/// The longest wait after failures.
const LONGEST_RETRY: Duration = Duration::from_secs(10);

/// Rules that are wanted in a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Where.
    pub namespace: Namespace,
    /// What.
    pub redirect: Redirect,
    /// By what.
    pub backend: BackendChoice,
}

/// A guard that runs. It ends when the value is dropped; the rules stay.
#[derive(Debug, Clone)]
pub struct Guard {
    wishes: Sender<Vec<Wish>>,
    report: Arc<Mutex<Report>>,
}

impl Guard {
    /// Starts one, with what is wanted.
    ///
    /// # Errors
    /// When there can be no thread for it.
    pub fn start(wanted: Vec<Wish>) -> io::Result<Self> {
        let (wishes, received) = channel();
        let report = Arc::new(Mutex::new(Report::default()));
        let mut keeper = Keeper { report: report.clone(), kept: HashMap::new() };
        keeper.want(wanted);
        keeper.tell();
        std::thread::Builder::new()
            .name("redirects".into())
            .spawn(move || keeper.keep(&received))?;
        Ok(Self { wishes, report })
    }

    /// Says what is wanted from now on. Where nothing is wanted any more, the rules are removed.
    pub fn want(&self, wishes: Vec<Wish>) {
        // The thread ends with the last sender only.
        drop(self.wishes.send(wishes));
    }

    /// What it has to tell.
    #[must_use]
    pub fn report(&self) -> Report {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A file of a namespace, as it is now: another one under the same name is another namespace.
type Identity = Option<(u64, u64)>;

struct Keeper {
    report: Arc<Mutex<Report>>,
    kept: HashMap<Namespace, Kept>,
}

/// A wish and how it stands.
struct Kept {
    wish: Wish,
    identity: Identity,
    /// Whether the namespace is there and tells of changes.
    is_heard: bool,
    events: Vec<Netlink>,
    was_in_force: bool,
    /// What put them in force.
    by: Option<Backend>,
    standing: Standing,
    /// Why traffic is not handed over though the rules are in force.
    passes: Option<String>,
    probe_due: Instant,
    /// Where DNS is to be handed over: who takes it, and whether it is handed over.
    dns: Option<(dns::Server, bool)>,
    /// What the kernel remembers of earlier questions is to be forgotten.
    forgets: bool,
    /// How many packets strict rules have dropped, where that can be read.
    dropped: Option<u64>,
    count_due: Instant,
    told_due: Instant,
    due: Instant,
    /// When rules were last installed, or could not be.
    last_attempt: Option<Instant>,
    failures: u32,
}

impl Keeper {
    fn keep(mut self, wishes: &Receiver<Vec<Wish>>) {
        loop {
            match wishes.try_recv() {
                Ok(wanted) => self.want(wanted),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            }
            let now = now();
            for kept in self.kept.values_mut() {
                kept.look_for_namespace(now);
            }
            for kept in self.kept.values_mut() {
                kept.look_at_dns(now);
            }
            for kept in self.kept.values_mut().filter(|kept| kept.is_due(now)) {
                kept.compare(now, &self.report);
            }
            for kept in self.kept.values_mut().filter(|kept| kept.probe_due <= now) {
                kept.probe(now, &self.report);
            }
            for kept in self.kept.values_mut().filter(|kept| kept.count_due <= now) {
                kept.count(now);
            }
            self.tell();
            self.wait(now);
        }
    }

    /// Takes over new wishes: unchanged ones go on as they are.
    fn want(&mut self, wanted: Vec<Wish>) {
        let mut before = std::mem::take(&mut self.kept);
        for wish in wanted {
            let same = before.remove(&wish.namespace).filter(|kept| kept.wish == wish);
            let kept = same.unwrap_or_else(|| Kept::new(wish.clone()));
            self.kept.insert(wish.namespace, kept);
        }
        let unwanted = before.into_values().filter(|kept| kept.identity.is_some());
        for kept in unwanted {
            if self.kept.contains_key(&kept.wish.namespace) {
                continue;
            }
            match remove(&kept.wish.namespace) {
                Ok(()) => tracing::info!(namespace = %kept.wish.namespace, "redirects removed"),
                Err(error) => {
                    tracing::warn!(namespace = %kept.wish.namespace, %error, "redirects not removed");
                }
            }
        }
    }

    fn tell(&self) {
        let mut standing: Vec<(String, Standing)> = self
            .kept
            .values()
            .map(|kept| (kept.wish.namespace.to_string(), kept.told_standing()))
            .collect();
        standing.sort_by(|(one, _), (other, _)| one.cmp(other));
        let dropped = self.kept.values().filter_map(|kept| {
            kept.dropped.map(|packets| (kept.wish.namespace.to_string(), packets))
        });
        let mut dropped: Vec<_> = dropped.collect();
        dropped.sort();
        let dns = self
            .kept
            .values()
            .filter_map(|kept| Some((kept.wish.namespace.to_string(), kept.dns.as_ref()?.1)));
        let mut dns: Vec<_> = dns.collect();
        dns.sort();
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        (report.standing, report.dropped, report.dns) = (standing, dropped, dns);
    }

    /// Sleeps until something is told, something is due, or it is time to look.
    fn wait(&mut self, now: Instant) {
        let due = self.kept.values().filter(|kept| kept.is_heard).map(|kept| kept.due);
        let until_due = due.min().map_or(LOOK, |due| due.saturating_duration_since(now));
        let timeout = until_due.min(LOOK).as_millis().max(1);
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::ZERO);
        let events = self.kept.values().flat_map(|kept| &kept.events);
        let mut waited: Vec<PollFd<'_>> =
            events.map(|events| PollFd::new(events.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut waited, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => tracing::warn!(%error, "waiting for changes of rules"),
        }
        drop(waited);
        for kept in self.kept.values_mut() {
            kept.hear(now);
        }
    }
}

impl Kept {
    fn new(wish: Wish) -> Self {
        Self {
            wish,
            identity: None,
            is_heard: false,
            events: Vec::new(),
            was_in_force: false,
            by: None,
            standing: Standing::Waiting,
            passes: None,
            probe_due: now(),
            dns: None,
            forgets: false,
            dropped: None,
            count_due: now(),
            told_due: now(),
            due: now(),
            last_attempt: None,
            failures: 0,
        }
    }

    /// Lets go of a namespace that has gone, and takes up one that has come.
    fn look_for_namespace(&mut self, now: Instant) {
        let identity = self.wish.namespace.identity();
        if identity == self.identity && (identity.is_none() || self.is_heard) {
            return;
        }
        self.events.clear();
        (self.is_heard, self.was_in_force) = (false, false);
        self.identity = identity;
        if identity.is_none() {
            self.standing = Standing::NoNamespace;
            return;
        }
        let Wish { redirect, namespace, .. } = &self.wish;
        let server = redirect.dns.map(|port| dns::Server::at(port, namespace)).transpose();
        // Listening comes before comparing, so that no change falls between.
        let taken_up = server.and_then(|server| Ok((server, listen(redirect, namespace)?)));
        match taken_up {
            Ok((server, events)) => {
                (self.events, self.is_heard, self.due) = (events, true, now);
                self.dns = server.map(|server| (server, false));
            }
            Err(error) => self.standing = Standing::Failed(error.to_string()),
        }
    }

    /// Sees whether DNS is to be handed over, and has the rules changed when that has changed.
    fn look_at_dns(&mut self, now: Instant) {
        let Some((server, is_handed_over)) = &mut self.dns else { return };
        let answers = server.look(now);
        if answers == *is_handed_over {
            return;
        }
        *is_handed_over = answers;
        let namespace = &self.wish.namespace;
        if answers {
            tracing::info!(%namespace, "DNS is handed over: its server answers");
        } else {
            tracing::warn!(%namespace, "DNS is not handed over any more: its server does not answer");
        }
        (self.due, self.was_in_force, self.forgets) = (now, false, true);
    }

    /// What is to be in force now.
    fn wanted(&self) -> Redirect {
        match self.dns {
            Some((_, false)) => self.wish.redirect.without_dns(),
            Some((_, true)) | None => self.wish.redirect.clone(),
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.is_heard && self.due <= now
    }

    /// Takes in what the kernel told: whatever it was, it is time to compare.
    fn hear(&mut self, now: Instant) {
        let mut heard = false;
        for events in &self.events {
            heard |= events.drain(|_| {}).unwrap_or(true);
        }
        if heard {
            // After a failure too: what was in the way may just have gone.
            let rest = if self.failures == 0 { BETWEEN_REPAIRS } else { LOOK };
            let earliest = self.last_attempt.map_or(now, |last| last + rest);
            self.due = self.due.min(earliest.max(now));
            // Others' rules may go before ours now.
            self.probe_due = self.probe_due.min(self.due);
        }
    }

    /// How it stands, by the rules and by what becomes of traffic.
    fn told_standing(&self) -> Standing {
        match &self.passes {
            Some(how) if self.standing == Standing::InForce => Standing::Failed(how.clone()),
            _ => self.standing.clone(),
        }
    }

    /// Tries whether traffic is handed over, where the rules are in force.
    fn probe(&mut self, now: Instant, report: &Mutex<Report>) {
        if self.standing != Standing::InForce {
            return;
        }
        let namespace = &self.wish.namespace;
        let passes = match probe(&self.wish.redirect, namespace) {
            Ok(passed @ Probe::Passed(..)) => Some(passed.to_string()),
            Ok(other) => {
                tracing::debug!(%namespace, "{other}");
                None
            }
            Err(error) => {
                tracing::debug!(%namespace, %error, "it cannot be tried what becomes of traffic");
                None
            }
        };
        match (&self.passes, &passes) {
            (None, Some(how)) => tracing::error!(%namespace, "{how}"),
            (Some(_), None) => tracing::info!(%namespace, "connections are handed over again"),
            (None, None) | (Some(_), Some(_)) => {}
        }
        self.probe_due = now + if passes.is_some() { PROBE_AGAIN } else { PROBE };
        if passes.is_some() {
            report.lock().unwrap_or_else(PoisonError::into_inner).passed += 1;
        }
        self.passes = passes;
    }

    /// Compares, and installs what is not as it is wanted.
    fn compare(&mut self, now: Instant, report: &Mutex<Report>) {
        let namespace = self.wish.namespace.to_string();
        let outcome = self.enforce();
        let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok((backend, replaced)) => {
                if let Some(before) = replaced {
                    self.last_attempt = Some(now);
                    if self.was_in_force {
                        report.repairs += 1;
                        tracing::warn!(namespace, was = %before, "redirects had been changed: repaired");
                    } else {
                        tracing::info!(namespace, "redirects installed");
                    }
                }
                (self.was_in_force, self.standing, self.failures) = (true, Standing::InForce, 0);
                self.by = Some(backend);
                if std::mem::take(&mut self.forgets)
                    && let Err(error) =
                        dns::forget(&self.wish.redirect.resolvers, &self.wish.namespace)
                {
                    tracing::warn!(namespace, %error, "questions under way may go astray");
                }
                let silent = backend == Backend::Iptables;
                self.due = now + if silent { COMPARE_SILENT } else { COMPARE };
            }
            Err(error) => {
                self.last_attempt = Some(now);
                report.failures += 1;
                let wait =
                    LOOK.saturating_mul(2u32.saturating_pow(self.failures)).min(LONGEST_RETRY);
                self.failures = self.failures.saturating_add(1);
                tracing::error!(namespace, %error, ?wait, "redirects are not as they should be");
                self.standing = Standing::Failed(error.to_string());
                // The tool itself may be gone.
                self.by = None;
                self.due = now + wait;
            }
        }
    }

    /// Reads what strict rules have dropped, and tells when it is more than before.
    fn count(&mut self, now: Instant) {
        self.count_due = now + COUNT;
        // What iptables has counted we do not read.
        let is_read = matches!(self.by, Some(Backend::Native | Backend::Nft));
        if !self.wish.redirect.strict || !is_read || self.standing != Standing::InForce {
            return;
        }
        let namespace = &self.wish.namespace;
        match dropped(namespace) {
            Ok(packets) => {
                // Rules that were installed anew count from 0 again.
                let is_more = packets > self.dropped.unwrap_or(0);
                if is_more && self.told_due <= now {
                    tracing::warn!(%namespace, packets, "strict redirects dropped what nothing captures");
                    self.told_due = now + TELL;
                }
                self.dropped = Some(packets);
            }
            Err(error) => tracing::debug!(%namespace, %error, "what is dropped cannot be read"),
        }
    }

    /// By what it is in force now, and what was there instead, if it was not what is wanted.
    fn enforce(&self) -> Result<(Backend, Option<Verdict>), RedirectError> {
        let Wish { namespace, backend, .. } = &self.wish;
        let redirect = &self.wanted();
        // Found once: looking for a tool starts it.
        let backend = self.by.map_or_else(|| backend.resolve(), Ok)?;
        if redirect.is_nothing() {
            return remove(namespace).map(|()| (backend, None));
        }
        let before = verify(redirect, backend, namespace)?;
        if before == Verdict::AsWanted {
            return Ok((backend, None));
        }
        let mut after = before.clone();
        // Somebody may change them again between two of our steps.
        for _ in 0..ATTEMPTS {
            apply(redirect, backend, namespace)?;
            after = verify(redirect, backend, namespace)?;
            if after == Verdict::AsWanted {
                return Ok((backend, Some(before)));
            }
        }
        Err(RedirectError::Invalid(format!("installed, and yet {after}")))
    }
}

impl Namespace {
    fn identity(&self) -> Identity {
        let own = std::path::Path::new("/proc/self/ns/net");
        let path = match self {
            Self::Own => own,
            Self::At(path) => path,
        };
        let file = std::fs::metadata(path).ok()?;
        Some((file.dev(), file.ino()))
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("this namespace"),
            Self::At(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AsWanted => f.write_str("as wanted"),
            Self::Absent => f.write_str("nothing of weft is installed"),
            Self::Differs(how) => f.write_str(&how.join("; ")),
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
fn now() -> Instant {
    Instant::now()
}
