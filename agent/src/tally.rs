//! How many flows each service has on the proxy path, as the kernel counts them on its own.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use weft_model::Name;
use weft_runtime::metrics::{Counter, Gauge, Opened};

/// One service's flows, TCP and UDP, that one worker carries.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    begun: Counter,
    open: Arc<Gauge>,
}

impl Tally {
    /// Counts a flow that begins; it is open until the result is dropped.
    pub(crate) fn begin(&self) -> Opened<Arc<Gauge>> {
        self.begun.increment();
        Opened::new(self.open.clone())
    }
}

/// One worker's tallies, for others to read.
pub(crate) type Shown = Mutex<HashMap<Name, Arc<Tally>>>;

/// One worker's tallies, for itself: what it counts by takes no lock but the first time.
#[derive(Debug, Default)]
pub(crate) struct Tallies(RefCell<HashMap<Name, Arc<Tally>>>);

impl Tallies {
    /// The tally of a service, which is shown from now on.
    pub(crate) fn of(&self, service: &Name, shown: &Shown) -> Arc<Tally> {
        let mut own = self.0.borrow_mut();
        if let Some(tally) = own.get(service) {
            return tally.clone();
        }
        let tally = Arc::<Tally>::default();
        own.insert(service.clone(), tally.clone());
        lock(shown).insert(service.clone(), tally.clone());
        tally
    }

    /// Forgets the services that are gone, and have no flow any more.
    pub(crate) fn forget(&self, is_gone: impl Fn(&Name) -> bool, shown: &Shown) {
        let has_ended = |name: &Name, tally: &Tally| is_gone(name) && tally.open.get() == 0;
        self.0.borrow_mut().retain(|name, tally| !has_ended(name, tally));
        lock(shown).retain(|name, tally| !has_ended(name, tally));
    }
}

/// How many flows of a service there have been and are, of all these workers.
pub(crate) fn flows_of<'a>(service: &str, workers: impl Iterator<Item = &'a Shown>) -> (u64, u64) {
    workers.fold((0, 0), |(begun, open), shown| {
        let shown = lock(shown);
        let tally = shown.get(service);
        let [more, more_open] = [|t: &Tally| t.begun.get(), |t: &Tally| t.open.get()]
            .map(|pick| tally.map_or(0, |tally| pick(tally)));
        (begun + more, open + more_open)
    })
}

fn lock(shown: &Shown) -> std::sync::MutexGuard<'_, HashMap<Name, Arc<Tally>>> {
    shown.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_of_all_workers_add_up_and_a_service_that_is_gone_is_forgotten_with_its_last() {
        let (a, b) = (Tallies::default(), Tallies::default());
        let shown = [Shown::default(), Shown::default()];
        let [shown_a, shown_b] = &shown;
        let echo: Name = "echo".into();
        let first = a.of(&echo, shown_a).begin();
        let second = a.of(&echo, shown_a).begin();
        let _third = b.of(&echo, shown_b).begin();
        drop(first);
        assert_eq!(flows_of("echo", shown.iter()), (3, 2));
        assert_eq!(flows_of("other", shown.iter()), (0, 0));

        a.forget(|_| true, shown_a);
        assert_eq!(flows_of("echo", shown.iter()), (3, 2), "a flow is open");
        drop(second);
        a.forget(|_| false, shown_a);
        assert_eq!(flows_of("echo", shown.iter()), (3, 1), "the service is there");
        a.forget(|_| true, shown_a);
        assert_eq!(flows_of("echo", shown.iter()), (1, 1));
    }
}
