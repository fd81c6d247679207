//! The state of one host name and the schedule of its lookups. Sans-io.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_model::{Backoff, DnsFamily, DnsPolicy, OnEmptyAnswer};

/// The random part of every interval, which spreads lookups over time.
const SPREAD: f64 = 0.1;

/// The answer to a query for the addresses of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FamilyAnswer {
    /// The family was not queried.
    Unasked,
    /// Addresses, at least one, and how long they are valid.
    Addresses(Vec<IpAddr>, Duration),
    /// The name does not exist, or has no addresses of this family.
    Absent,
    /// No answer, or an error.
    Failed(String),
}

/// The result of one lookup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LookupResult {
    pub(super) v4: FamilyAnswer,
    pub(super) v6: FamilyAnswer,
}

/// What a lookup changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Nothing.
    Same,
    /// The name has other addresses.
    Changed { addresses: usize },
    /// The name no longer has addresses.
    Absent,
    /// Lookups fail from now on; this many addresses stay in use.
    Failed { error: String, kept: usize },
}

/// The state of a host name.
#[derive(Debug)]
pub(super) struct HostEntry {
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    has_answered: bool,
    failures: u32,
    last_error: Option<String>,
    /// When the next lookup begins; none while one is running.
    due: Option<Instant>,
}

impl HostEntry {
    /// A name whose first lookup is due now.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            v4: Vec::new(),
            v6: Vec::new(),
            has_answered: false,
            failures: 0,
            last_error: None,
            due: Some(now),
        }
    }

    /// Marks a lookup as running.
    pub(super) fn begin(&mut self) {
        self.due = None;
    }

    /// When the next lookup begins.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether a lookup has completed, with or without success.
    pub(super) fn has_answered(&self) -> bool {
        self.has_answered
    }

    /// Why the last lookup failed.
    pub(super) fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// The addresses in use.
    pub(super) fn addresses(&self, family: DnsFamily) -> Arc<[IpAddr]> {
        choose(family, &self.v4, &self.v6)
    }

    /// Applies the result of a lookup and schedules the next one. `random` is between 0 and 1.
    pub(super) fn take(
        &mut self,
        found: LookupResult,
        policy: &DnsPolicy,
        now: Instant,
        random: f64,
    ) -> Event {
        let LookupResult { v4, v6 } = found;
        let before = self.addresses(policy.family);
        let is_first = !std::mem::replace(&mut self.has_answered, true);
        let is_absent =
            [&v4, &v6].iter().all(|a| matches!(a, FamilyAnswer::Absent | FamilyAnswer::Unasked));
        let error = match (&v4, &v6) {
            // Some servers answer for one family only.
            (FamilyAnswer::Addresses(..), _) | (_, FamilyAnswer::Addresses(..)) => None,
            (FamilyAnswer::Failed(error), _) | (_, FamilyAnswer::Failed(error)) => {
                Some(error.clone())
            }
            _ => None,
        };
        let ttl = [&v4, &v6].iter().filter_map(|answer| answer.ttl()).min();
        if !(is_absent && policy.on_empty_answer == OnEmptyAnswer::Keep) {
            update(&mut self.v4, v4);
            update(&mut self.v6, v6);
        }
        self.failures = if error.is_some() { self.failures.saturating_add(1) } else { 0 };
        self.due = Some(now + self.interval(policy, ttl, random));
        let after = self.addresses(policy.family);
        let had_failed = std::mem::replace(&mut self.last_error, error.clone()).is_some();
        match error {
            Some(error) if !had_failed => Event::Failed { error, kept: after.len() },
            Some(_) => Event::Same,
            None if after.is_empty() && (is_first || !before.is_empty()) => Event::Absent,
            None if is_first || had_failed || before != after => {
                Event::Changed { addresses: after.len() }
            }
            None => Event::Same,
        }
    }

    /// Time until the next lookup.
    fn interval(&self, policy: &DnsPolicy, ttl: Option<Duration>, random: f64) -> Duration {
        let random = random.clamp(0.0, 1.0);
        if self.failures > 0 {
            let backoff = Backoff { first: policy.failure_base, longest: policy.failure_max };
            return backoff.delay(self.failures - 1).mul_f64(0.5 + random / 2.0);
        }
        let ttl = ttl.filter(|ttl| policy.respects_ttl && !ttl.is_zero());
        let interval = ttl.unwrap_or(policy.refresh);
        // Shorter rather than longer: an answer is not used beyond its TTL.
        interval.mul_f64(1.0 - SPREAD * random) + policy.jitter.mul_f64(random)
    }
}

impl FamilyAnswer {
    fn ttl(&self) -> Option<Duration> {
        match self {
            Self::Addresses(_, ttl) => Some(*ttl),
            Self::Unasked | Self::Absent | Self::Failed(_) => None,
        }
    }
}

fn update(kept: &mut Vec<IpAddr>, answer: FamilyAnswer) {
    match answer {
        FamilyAnswer::Addresses(mut addresses, _) => {
            // Servers rotate the order.
            addresses.sort_unstable();
            addresses.dedup();
            *kept = addresses;
        }
        FamilyAnswer::Absent => kept.clear(),
        FamilyAnswer::Unasked | FamilyAnswer::Failed(_) => {}
    }
}

/// The addresses that a family setting selects.
fn choose(family: DnsFamily, v4: &[IpAddr], v6: &[IpAddr]) -> Arc<[IpAddr]> {
    let both = || v4.iter().chain(v6).copied().collect();
    // Which of its addresses a program on this host listens at, its name does not say.
    let is_this_host = !v4.is_empty() && v4.iter().chain(v6).all(IpAddr::is_loopback);
    match family {
        DnsFamily::Auto if is_this_host => both(),
        DnsFamily::Auto if v6.is_empty() => v4.into(),
        DnsFamily::Auto | DnsFamily::V6Only => v6.into(),
        DnsFamily::V4Preferred if v4.is_empty() => v6.into(),
        DnsFamily::V4Preferred | DnsFamily::V4Only => v4.into(),
        DnsFamily::All => both(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(text: &[&str], ttl: u64) -> FamilyAnswer {
        let parse = |text: &&str| text.parse().expect("an address");
        FamilyAnswer::Addresses(text.iter().map(parse).collect(), Duration::from_secs(ttl))
    }

    fn v4(answer: FamilyAnswer) -> LookupResult {
        LookupResult { v4: answer, v6: FamilyAnswer::Absent }
    }

    fn failed() -> LookupResult {
        LookupResult {
            v4: FamilyAnswer::Failed("SERVFAIL".into()),
            v6: FamilyAnswer::Failed("SERVFAIL".into()),
        }
    }

    fn start() -> Instant {
        #[expect(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
        Instant::now()
    }

    fn shown(entry: &HostEntry, family: DnsFamily) -> Vec<String> {
        entry.addresses(family).iter().map(ToString::to_string).collect()
    }

    fn wait(entry: &HostEntry, now: Instant) -> Duration {
        entry.due().expect("no lookup is under way") - now
    }

    #[test]
    fn addresses_are_kept_through_failures_and_looked_up_with_backoff() {
        let now = start();
        let policy = DnsPolicy::default();
        let mut entry = HostEntry::new(now);
        entry.take(v4(addresses(&["10.0.0.2", "10.0.0.1"], 60)), &policy, now, 0.0);
        assert_eq!(wait(&entry, now), policy.refresh);
        let event = entry.take(failed(), &policy, now, 1.0);
        assert_eq!(event, Event::Failed { error: "SERVFAIL".into(), kept: 2 });
        assert_eq!(wait(&entry, now), policy.failure_base);
        assert_eq!(entry.take(failed(), &policy, now, 1.0), Event::Same);
        assert_eq!(wait(&entry, now), policy.failure_base * 2);
        for _ in 0..40 {
            entry.take(failed(), &policy, now, 1.0);
        }
        assert_eq!(wait(&entry, now), policy.failure_max);
        assert_eq!(shown(&entry, policy.family), ["10.0.0.1", "10.0.0.2"]);
        let event = entry.take(v4(addresses(&["10.0.0.1"], 60)), &policy, now, 0.0);
        assert_eq!(event, Event::Changed { addresses: 1 });
        assert_eq!(entry.last_error(), None);
    }

    #[test]
    fn absent_name_loses_its_addresses_unless_the_policy_keeps_them() {
        let now = start();
        for (on_empty_answer, left) in [(OnEmptyAnswer::Drop, 0), (OnEmptyAnswer::Keep, 1)] {
            let policy = DnsPolicy { on_empty_answer, ..DnsPolicy::default() };
            let mut entry = HostEntry::new(now);
            entry.take(v4(addresses(&["10.0.0.1"], 60)), &policy, now, 0.0);
            let event = entry.take(v4(FamilyAnswer::Absent), &policy, now, 0.0);
            assert_eq!(entry.addresses(policy.family).len(), left);
            assert_eq!(event == Event::Absent, left == 0);
        }
    }

    #[test]
    fn absence_of_one_family_beside_a_failure_of_the_other_keeps_the_other() {
        let now = start();
        let policy = DnsPolicy { family: DnsFamily::All, ..DnsPolicy::default() };
        let mut entry = HostEntry::new(now);
        let both = LookupResult { v4: addresses(&["10.0.0.1"], 9), v6: addresses(&["fd00::1"], 9) };
        entry.take(both, &policy, now, 0.0);
        let half =
            LookupResult { v4: FamilyAnswer::Failed("timeout".into()), v6: FamilyAnswer::Absent };
        entry.take(half, &policy, now, 0.0);
        assert_eq!(shown(&entry, policy.family), ["10.0.0.1"]);
    }

    #[test]
    fn interval_follows_ttl_only_when_respected_and_above_zero() {
        let now = start();
        for (respects_ttl, ttl, seconds) in [(true, 1, 1), (true, 0, 5), (false, 1, 5)] {
            let policy = DnsPolicy { respects_ttl, ..DnsPolicy::default() };
            let mut entry = HostEntry::new(now);
            entry.take(v4(addresses(&["10.0.0.1"], ttl)), &policy, now, 0.0);
            assert_eq!(wait(&entry, now), Duration::from_secs(seconds));
        }
    }

    #[test]
    fn jitter_is_added_in_proportion_to_the_random_number() {
        let policy = DnsPolicy { jitter: Duration::from_secs(4), ..DnsPolicy::default() };
        let now = start();
        let mut entry = HostEntry::new(start());
        entry.take(v4(addresses(&["10.0.0.1"], 60)), &policy, now, 1.0);
        assert_eq!(wait(&entry, now), policy.refresh.mul_f64(1.0 - SPREAD) + policy.jitter);
    }

    #[test]
    fn family_setting_selects_the_addresses() {
        let v4 = ["10.0.0.1"];
        let v6 = ["fd00::1"];
        for (family, has_v4, has_v6, chosen) in [
            (DnsFamily::Auto, true, true, &["fd00::1"][..]),
            (DnsFamily::Auto, true, false, &["10.0.0.1"]),
            (DnsFamily::V4Preferred, true, true, &["10.0.0.1"]),
            (DnsFamily::V4Preferred, false, true, &["fd00::1"]),
            (DnsFamily::V4Only, false, true, &[]),
            (DnsFamily::V6Only, true, false, &[]),
            (DnsFamily::All, true, true, &["10.0.0.1", "fd00::1"]),
        ] {
            let answer = |has, text| if has { addresses(text, 60) } else { FamilyAnswer::Absent };
            let found = LookupResult { v4: answer(has_v4, &v4), v6: answer(has_v6, &v6) };
            let now = start();
            let mut entry = HostEntry::new(start());
            let policy = DnsPolicy { family, ..DnsPolicy::default() };
            entry.take(found, &policy, now, 0.0);
            assert_eq!(shown(&entry, family), chosen, "{family:?} {has_v4} {has_v6}");
        }
    }

    #[test]
    fn name_of_this_host_keeps_both_families() {
        let now = start();
        let mut entry = HostEntry::new(start());
        let found = LookupResult { v4: addresses(&["127.0.0.1"], 60), v6: addresses(&["::1"], 60) };
        entry.take(found, &DnsPolicy::default(), now, 0.0);
        assert_eq!(shown(&entry, DnsFamily::Auto), ["127.0.0.1", "::1"]);
    }
}
