//! Changes the kernel's table to match the services, whatever state it is in.
//!
//! It compares the installed table with the desired one and changes what differs. So it handles a new configuration,
//! changes by other programs, an agent that was killed half way, and an empty kernel in the same way. A
//! service switches to a new map in one transaction, once the map is complete; until then the old map serves.
//! Established connections are in conntrack and are not touched.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

use super::desired::{COMMENT, DesiredTable, TABLE, chain_name, group_name};
use super::installed::{InstalledTable, attributes, described};
use super::service::KernelService;
use super::table::{
    KernelChain, base_chains, group_chain, make_map, map_name, map_values, service_rule,
};
use super::table_sets::TableSet;
use crate::netlink::nf_tables::{self as nf, ELEMENT_LIMIT, ElementKeys, SetElement};
use crate::netlink::{Netlink, NetlinkMessage};

/// The bytes of the messages that begin and end a transaction.
const BORDER_BYTES: usize = 40;

/// A netlink socket to the packet filter, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct KernelTable(Netlink);

/// Messages that must be in the same transaction.
type AtomicChange = Vec<NetlinkMessage>;

/// What a reconciliation did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ReconcileOutcome {
    /// The number of transactions; 0 when the table matched.
    pub(super) transactions: usize,
    /// The number of maps created.
    pub(super) maps: usize,
}

/// Whether an error says that the table contains something that weft has not made.
fn is_foreign_conflict(error: &io::Error) -> bool {
    const KINDS: [Errno; 4] = [Errno::EBUSY, Errno::ENOENT, Errno::EEXIST, Errno::EINVAL];
    KINDS.iter().any(|kind| error.raw_os_error() == Some(*kind as i32))
}

impl KernelTable {
    pub(super) fn open() -> io::Result<Self> {
        Netlink::open(SockProtocol::NetlinkNetFilter).map(Self)
    }

    /// The number of flows of each service, by the name of its chain.
    pub(super) fn counters(&mut self) -> io::Result<BTreeMap<String, u64>> {
        let counters = match self.0.dump(&nf::get_counters(TABLE)) {
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Vec::new(),
            dumped => dumped?,
        };
        Ok(counters.iter().filter_map(|counter| nf::parse_counter(attributes(counter))).collect())
    }

    /// Deletes the table.
    pub(super) fn remove(&mut self) -> io::Result<()> {
        self.commit(vec![nf::make_table(TABLE, None), nf::delete_table(TABLE)])
    }

    /// Makes the table match `desired`. With `deep` also compares the contents of maps, and not only their names.
    pub(super) fn reconcile(
        &mut self,
        desired: DesiredTable<'_>,
        deep: bool,
    ) -> io::Result<ReconcileOutcome> {
        match self.reconcile_once(desired, deep) {
            // Another program has put something into our table that blocks a change.
            Err(error) if is_foreign_conflict(&error) => {
                self.remove()?;
                self.reconcile_once(desired, deep)
            }
            outcome => outcome,
        }
    }

    fn reconcile_once(
        &mut self,
        desired: DesiredTable<'_>,
        deep: bool,
    ) -> io::Result<ReconcileOutcome> {
        let installed = match InstalledTable::read(&mut self.0)? {
            None if desired.is_empty() => return Ok(ReconcileOutcome::default()),
            None => InstalledTable::default(),
            Some(_) if desired.is_empty() => {
                self.remove()?;
                return Ok(ReconcileOutcome { transactions: 1, maps: 0 });
            }
            Some(installed) => installed,
        };
        let mut outcome = ReconcileOutcome::default();
        self.prepare(desired, &installed, &mut outcome)?;
        // A failure for one service does not block other services or the cleanup.
        let mut failed = None;
        for service in desired.services {
            if let Err(error) = self.serve(service, &installed, deep, &mut outcome) {
                failed.get_or_insert(error);
            }
        }
        self.clear(desired, &installed, &mut outcome)?;
        failed.map_or(Ok(outcome), Err)
    }

    /// Creates what services depend on, and removes what is in the way.
    fn prepare(
        &mut self,
        desired: DesiredTable<'_>,
        installed: &InstalledTable,
        outcome: &mut ReconcileOutcome,
    ) -> io::Result<()> {
        let mut steps: Vec<AtomicChange> = Vec::new();
        if !installed.exists {
            steps.push(vec![nf::make_table(TABLE, Some(COMMENT))]);
        }
        // Maps that no rule uses are left over from an agent that ended half way.
        let unreferenced_maps = installed.unreferenced_maps();
        steps.extend(unreferenced_maps.iter().map(|name| vec![nf::delete_set(TABLE, name)]));
        let missing = TableSet::all().filter(|index| !installed.sets.contains(index.name()));
        steps.extend(missing.map(|index| vec![index.make()]));
        // Security groups come first: set elements refer to them.
        let groups = desired.groups.iter().map(group_chain);
        steps.extend(
            groups.filter(|group| !installed.has(group)).map(|group| replace_rules(&group)),
        );
        for index in TableSet::all() {
            // An element with other data is deleted, so that it can be added with the desired data.
            let diff = installed.diff(index, &index.elements(desired));
            delete(index, &diff.changed, &mut steps);
            if index.is_for_security_groups() {
                delete(index, &diff.extra, &mut steps);
            }
            if !index.is_per_service() {
                add(index, &diff.missing, &mut steps);
            }
        }
        steps.push(chains(desired, installed));
        self.commit_all(steps, outcome)
    }

    /// Makes the table serve a service with its desired map.
    fn serve(
        &mut self,
        service: &KernelService,
        installed: &InstalledTable,
        deep: bool,
        outcome: &mut ReconcileOutcome,
    ) -> io::Result<()> {
        let mut changes = AtomicChange::new();
        let name = chain_name(service.key);
        let kept = match installed.map_of(service) {
            Some(map) if !deep || self.holds(service, &map)? => Some(map),
            _ => None,
        };
        if kept.is_none() || !installed.counters.contains_key(&name) {
            let map = self.fill_map(service, installed, outcome)?;
            changes.extend(point_chain_at_map(service, &map));
            changes.extend(installed.maps_of(&name).map(|old| nf::delete_set(TABLE, &old)));
        }
        let mut steps = vec![changes];
        for index in TableSet::all() {
            let missing = index.element_of(service).filter(|e| !installed.has_element(index, e));
            add(index, missing.as_slice(), &mut steps);
        }
        self.commit_all(steps, outcome)
    }

    /// Removes what is not needed.
    fn clear(
        &mut self,
        desired: DesiredTable<'_>,
        installed: &InstalledTable,
        outcome: &mut ReconcileOutcome,
    ) -> io::Result<()> {
        let mut steps = Vec::new();
        for index in TableSet::all().filter(|index| !index.is_for_security_groups()) {
            delete(index, &installed.diff(index, &index.elements(desired)).extra, &mut steps);
        }
        let base = base_chains(desired);
        let services = desired.services.iter().map(|service| chain_name(service.key));
        let groups = desired.groups.iter().map(|group| group_name(group.key));
        let services: BTreeSet<String> = services.chain(groups).collect();
        let is_wanted =
            |name: &String| services.contains(name) || base.iter().any(|chain| chain.name == *name);
        for name in installed.chains.keys().filter(|name| !is_wanted(name)) {
            let mut step = vec![nf::delete_chain(TABLE, name)];
            step.extend(installed.maps_of(name).map(|old| nf::delete_set(TABLE, &old)));
            steps.push(step);
        }
        let unused = installed.counters.keys().filter(|name| !services.contains(*name));
        steps.extend(unused.map(|name| vec![nf::delete_counter(TABLE, name)]));
        self.commit_all(steps, outcome)
    }

    /// Creates a map that no rule uses yet, and fills it.
    fn fill_map(
        &mut self,
        service: &KernelService,
        installed: &InstalledTable,
        outcome: &mut ReconcileOutcome,
    ) -> io::Result<String> {
        let stem = map_name(service);
        let numbered = (2..).map(|number| format!("{stem}_{number}"));
        let mut names = std::iter::once(stem.clone()).chain(numbered);
        let name = names.find(|name| !installed.referenced_sets.contains(name)).unwrap_or(stem);
        let values = map_values(&service.table);
        let slots: Vec<([u8; 4], &[u8])> = slots(service, &values).collect();
        let mut steps = vec![vec![make_map(service, &name)]];
        for list in slots.chunks(ELEMENT_LIMIT) {
            let elements = list.iter().map(|(slot, value)| (&slot[..], *value));
            steps.push(vec![nf::add_values(TABLE, &name, elements)]);
        }
        self.commit_all(steps, outcome)?;
        outcome.maps += 1;
        Ok(name)
    }

    /// Whether a map has the desired contents.
    fn holds(&mut self, service: &KernelService, map: &str) -> io::Result<bool> {
        let values = map_values(&service.table);
        let desired: HashMap<[u8; 4], &[u8]> = slots(service, &values).collect();
        let mut right = 0;
        let mut wrong = 0;
        self.0.stream(&nf::get_elements(TABLE, map), |reply| {
            for element in nf::parse_elements(attributes(reply)) {
                let key = nf::element_key(element).and_then(<[u8]>::first_chunk);
                let value = key.and_then(|key| desired.get(key));
                let is_right = value.is_some() && value.copied() == nf::element_value(element);
                *(if is_right { &mut right } else { &mut wrong }) += 1;
            }
        })?;
        Ok(right == desired.len() && wrong == 0)
    }

    /// Commits changes with as few transactions as fit into the send buffer: without privileges a whole map, or the
    /// elements of many services, exceed it.
    fn commit_all(
        &mut self,
        steps: Vec<AtomicChange>,
        outcome: &mut ReconcileOutcome,
    ) -> io::Result<()> {
        let limit = self.0.batch_limit_bytes().saturating_sub(BORDER_BYTES);
        for changes in transactions(steps, limit) {
            outcome.transactions += 1;
            self.commit(changes)?;
        }
        Ok(())
    }

    fn commit(&mut self, changes: Vec<NetlinkMessage>) -> io::Result<()> {
        self.0.batch(&nf::transaction(changes))
    }
}

/// Groups changes, in order, into transactions of at most `limit_bytes`.
fn transactions(steps: Vec<AtomicChange>, limit_bytes: usize) -> Vec<Vec<NetlinkMessage>> {
    let mut transactions: Vec<Vec<NetlinkMessage>> = Vec::new();
    let mut room = 0;
    for step in steps.into_iter().filter(|step| !step.is_empty()) {
        let bytes: usize = step.iter().map(NetlinkMessage::length).sum();
        match transactions.last_mut().filter(|_| bytes <= room) {
            Some(transaction) => {
                transaction.extend(step);
                room -= bytes;
            }
            None => {
                transactions.push(step);
                room = limit_bytes.saturating_sub(bytes);
            }
        }
    }
    transactions
}

/// Each slot of a service's Maglev table with its map value.
fn slots<'a>(
    service: &KernelService,
    values: &'a [Vec<u8>],
) -> impl Iterator<Item = ([u8; 4], &'a [u8])> {
    let owners = service.table.owners().iter();
    let value = |owner: &u32| values.get(usize::try_from(*owner).ok()?).map(Vec::as_slice);
    (0u32..).zip(owners).filter_map(move |(slot, owner)| Some((slot.to_ne_bytes(), value(owner)?)))
}

/// Makes the chain of a service use this map.
fn point_chain_at_map(service: &KernelService, map: &str) -> AtomicChange {
    let name = chain_name(service.key);
    let rule = nf::rule(TABLE, &name, service_rule(service, map));
    vec![
        nf::make_counter(TABLE, &name),
        nf::make_chain(nf::chain_named(TABLE, &name)),
        nf::flush_chain(TABLE, &name),
        nf::append_rule(rule),
    ]
}

/// Installs the base chains that differ from the desired ones.
fn chains(desired: DesiredTable<'_>, installed: &InstalledTable) -> AtomicChange {
    let base = base_chains(desired);
    let differing = base.iter().filter(|chain| !installed.has(chain));
    let install = |chain| install(chain, installed.chains.contains_key(&chain.name));
    differing.flat_map(install).collect()
}

/// Creates a chain that set elements can refer to, or replaces the rules of an existing one. The rules count
/// in a counter with the name of the chain.
fn replace_rules(chain: &KernelChain) -> AtomicChange {
    let rules = chain.rules.iter().map(|rule| nf::rule(TABLE, &chain.name, rule.clone()));
    let mut changes = vec![
        nf::make_counter(TABLE, &chain.name),
        nf::make_chain(described(chain)),
        nf::flush_chain(TABLE, &chain.name),
    ];
    changes.extend(rules.map(nf::append_rule));
    changes
}

/// Installs a chain, replacing the one with the same name.
fn install(chain: &KernelChain, is_there: bool) -> AtomicChange {
    let mut changes = AtomicChange::new();
    if is_there {
        changes.push(nf::delete_chain(TABLE, &chain.name));
    }
    changes.push(nf::make_chain(described(chain)));
    let rules = chain.rules.iter().map(|rule| nf::rule(TABLE, &chain.name, rule.clone()));
    changes.extend(rules.map(nf::append_rule));
    changes
}

fn add(index: TableSet, elements: &[SetElement], steps: &mut Vec<AtomicChange>) {
    let parts = elements.chunks(ELEMENT_LIMIT);
    steps.extend(parts.map(|part| vec![nf::add_elements(TABLE, index.name(), part)]));
}

fn delete(index: TableSet, keys: &[ElementKeys], steps: &mut Vec<AtomicChange>) {
    let parts = keys.chunks(ELEMENT_LIMIT);
    steps.extend(parts.map(|part| vec![nf::delete_elements(TABLE, index.name(), part)]));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_stay_whole_and_ordered_and_fill_transactions() {
        let step = |names: &[&str]| names.iter().map(|name| nf::delete_set(TABLE, name)).collect();
        let steps: Vec<AtomicChange> =
            vec![step(&["a"]), step(&[]), step(&["b", "c"]), step(&["d"]), step(&["e", "f", "g"])];
        let one = nf::delete_set(TABLE, "a").length();
        let sizes = |limit| -> Vec<usize> {
            let parts = transactions(steps.clone(), limit);
            assert_eq!(parts.concat(), steps.concat(), "no change is lost, at {limit}");
            parts.iter().map(Vec::len).collect()
        };
        assert_eq!(sizes(one * 100), [7]);
        assert_eq!(sizes(one * 4), [4, 3]);
        assert_eq!(sizes(one * 3), [3, 1, 3]);
        assert_eq!(sizes(one), [1, 2, 1, 3], "one change is not split");
        assert!(transactions(vec![AtomicChange::new()], 100).is_empty());
    }
}
