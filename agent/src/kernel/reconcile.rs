//! Makes the kernel's table what the services come to, whatever was there before.
//!
//! It looks at what is there, and changes what differs: it does not matter whether the difference is
//! a change of configuration, what somebody else did, an agent that was killed half way, or that
//! there was nothing. A service goes over to its new map in one transaction, when the map is whole;
//! until then the old one serves. Established connections are conntrack's, and not touched.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

use super::index::{Index, chain_name, group_name};
use super::service::KernelService;
use super::table::{
    COMMENT, Chain, TABLE, Wanted, base_chains, group_chain, make_map, map_name, map_values,
    service_rule,
};
use crate::netlink::nf_tables::{self as nf, ELEMENT_LIMIT, Element, Expression};
use crate::netlink::{Attributes, Message, Netlink, Reply, find};

/// How many bytes of a message an element of a map takes at most: an IPv6 address and port, the slot,
/// and what stands around them.
const ELEMENT_BYTES: usize = 52;
/// Before a message's attributes.
const FIXED_BYTES: usize = 4;

/// The kernel's packet filter, in the namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Kernel(Netlink);

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// How many transactions it took; 0 when everything was as wanted.
    pub(super) transactions: usize,
    /// How many maps were made.
    pub(super) maps: usize,
}

/// What is there of ours.
#[derive(Debug, Default)]
struct Found {
    exists: bool,
    /// Each chain, as the kernel tells it.
    chains: BTreeMap<String, Vec<u8>>,
    /// The rules of each chain, in order.
    rules: BTreeMap<String, Vec<Vec<u8>>>,
    sets: BTreeSet<String>,
    counters: BTreeMap<String, u64>,
    /// The elements of each index.
    elements: BTreeMap<&'static str, Vec<Vec<u8>>>,
}

impl Found {
    fn rules_of(&self, chain: &str) -> &[Vec<u8>] {
        self.rules.get(chain).map_or(&[], Vec::as_slice)
    }

    fn elements_of(&self, index: Index) -> &[Vec<u8>] {
        self.elements.get(index.name()).map_or(&[], Vec::as_slice)
    }

    /// The sets that rules look into.
    fn looked_into(&self) -> BTreeSet<String> {
        self.rules.values().flatten().flat_map(|rule| nf::told_lookups(rule)).collect()
    }

    /// Maps that no rule looks into.
    fn leftovers(&self) -> Vec<String> {
        let looked_into = self.looked_into();
        let is_leftover = |name: &&String| !looked_into.contains(*name) && !is_index(name);
        self.sets.iter().filter(is_leftover).cloned().collect()
    }

    /// The maps that a chain's rules look into.
    fn maps_of(&self, chain: &str) -> impl Iterator<Item = String> {
        let maps: BTreeSet<String> =
            self.rules_of(chain).iter().flat_map(|rule| nf::told_lookups(rule)).collect();
        maps.into_iter().filter(|name| !is_index(name) && self.sets.contains(name))
    }

    /// The map of a service, when its chain is as wanted.
    fn map_of(&self, service: &KernelService) -> Option<String> {
        let name = chain_name(service.key);
        let [rule] = self.rules_of(&name) else { return None };
        let map = nf::told_lookups(rule).next()?;
        let wanted = nf::rule(TABLE, &name, service_rule(service, &map));
        (map.starts_with(&map_name(service)) && wanted.are_in(rule)).then_some(map)
    }

    fn has(&self, chain: &Chain) -> bool {
        let wanted = told(chain);
        let rules = self.rules_of(&chain.name);
        let same_rule = |(rule, told): (&Vec<Expression>, &Vec<u8>)| {
            nf::rule(TABLE, &chain.name, rule.clone()).are_in(told)
        };
        self.chains.get(&chain.name).is_some_and(|told| wanted.are_in(told))
            && rules.len() == chain.rules.len()
            && chain.rules.iter().zip(rules).all(same_rule)
    }
}

/// Whether an error says that the table is not as we would have made it.
fn is_in_the_way(error: &io::Error) -> bool {
    const KINDS: [Errno; 4] = [Errno::EBUSY, Errno::ENOENT, Errno::EEXIST, Errno::EINVAL];
    KINDS.iter().any(|kind| error.raw_os_error() == Some(*kind as i32))
}

/// Whether a set is no service's map: an index, or one that stands in somebody's rule.
fn is_index(set: &str) -> bool {
    set.starts_with("__") || Index::ALL.iter().any(|index| index.name() == set)
}

impl Kernel {
    pub(super) fn open() -> io::Result<Self> {
        Netlink::open(SockProtocol::NetlinkNetFilter).map(Self)
    }

    /// How many flows each service has had, by the names of their chains.
    pub(super) fn counters(&mut self) -> io::Result<BTreeMap<String, u64>> {
        let told = match self.0.dump(&nf::get_counters(TABLE)) {
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Vec::new(),
            told => told?,
        };
        Ok(told.iter().filter_map(|counter| nf::told_counter(attributes(counter))).collect())
    }

    /// Removes all of it.
    pub(super) fn remove(&mut self) -> io::Result<()> {
        self.commit(vec![nf::make_table(TABLE, None), nf::delete_table(TABLE)])
    }

    /// Makes the table carry what is wanted and nothing else. With `deep`, what the maps hold is
    /// compared too, and not only their names.
    pub(super) fn reconcile(&mut self, wanted: Wanted<'_>, deep: bool) -> io::Result<Outcome> {
        match self.bring(wanted, deep) {
            // Somebody put something of their own into our table that keeps it from being changed.
            Err(error) if is_in_the_way(&error) => {
                self.remove()?;
                self.bring(wanted, deep)
            }
            outcome => outcome,
        }
    }

    fn bring(&mut self, wanted: Wanted<'_>, deep: bool) -> io::Result<Outcome> {
        let found = match self.read()? {
            None if wanted.is_empty() => return Ok(Outcome::default()),
            None => Found::default(),
            Some(_) if wanted.is_empty() => {
                self.remove()?;
                return Ok(Outcome { transactions: 1, maps: 0 });
            }
            Some(found) => found,
        };
        let mut outcome = Outcome::default();
        self.prepare(wanted, &found, &mut outcome)?;
        // One that fails keeps no other from being served, and nothing from being cleared away.
        let mut failed = None;
        for service in wanted.services {
            if let Err(error) = self.serve(service, &found, deep, &mut outcome) {
                failed.get_or_insert(error);
            }
        }
        self.clear(wanted, &found, &mut outcome)?;
        failed.map_or(Ok(outcome), Err)
    }

    /// Makes what services are put into, and clears away what is in the way.
    fn prepare(
        &mut self,
        wanted: Wanted<'_>,
        found: &Found,
        outcome: &mut Outcome,
    ) -> io::Result<()> {
        let mut changes = Vec::new();
        if !found.exists {
            changes.push(nf::make_table(TABLE, Some(COMMENT)));
        }
        // Maps that no rule looks into are what an agent left that was ended half way.
        let leftovers = found.leftovers();
        changes.extend(leftovers.iter().map(|name| nf::delete_set(TABLE, name)));
        let missing = Index::ALL.into_iter().filter(|index| !found.sets.contains(index.name()));
        changes.extend(missing.map(Index::make));
        // Groups come first: elements lead to them.
        for group in wanted.groups.iter().map(group_chain).filter(|group| !found.has(group)) {
            changes.push(nf::make_counter(TABLE, &group.name));
            changes.extend(refill(&group));
        }
        for index in Index::ALL {
            // A key that leads elsewhere goes, so that it can come anew.
            let elements = index.elements(wanted);
            let there = found.elements_of(index);
            let is_other = |told: &&Vec<u8>| {
                let same_key = |e: &Element| nf::told_key(told).is_some_and(|key| e.has_key(key));
                elements.iter().any(same_key) && !elements.iter().any(|e| e.is(told))
            };
            delete(index, there.iter().filter(is_other), &mut changes);
            if !index.is_per_service() {
                let missing = elements.iter().filter(|e| !there.iter().any(|told| e.is(told)));
                let missing: Vec<Element> = missing.cloned().collect();
                add(index, &missing, &mut changes);
            }
        }
        changes.extend(chains(wanted, found));
        self.carry_out(changes, outcome)
    }

    /// Makes the table carry a service by the map that it wants.
    fn serve(
        &mut self,
        service: &KernelService,
        found: &Found,
        deep: bool,
        outcome: &mut Outcome,
    ) -> io::Result<()> {
        let mut changes = Vec::new();
        let name = chain_name(service.key);
        let kept = match found.map_of(service) {
            Some(map) if !deep || self.holds(service, &map)? => Some(map),
            _ => None,
        };
        if kept.is_none() || !found.counters.contains_key(&name) {
            let map = self.fill_map(service, found, outcome)?;
            changes.extend(flip(service, &map));
            changes.extend(found.maps_of(&name).map(|old| nf::delete_set(TABLE, &old)));
        }
        for index in Index::ALL {
            let element = index.element_of(service);
            let there = found.elements_of(index);
            let missing = element.filter(|e| !there.iter().any(|told| e.is(told)));
            add(index, missing.as_slice(), &mut changes);
        }
        self.carry_out(changes, outcome)
    }

    /// Removes what nothing needs any more.
    fn clear(
        &mut self,
        wanted: Wanted<'_>,
        found: &Found,
        outcome: &mut Outcome,
    ) -> io::Result<()> {
        let mut changes = Vec::new();
        for index in Index::ALL {
            let elements = index.elements(wanted);
            let is_strange = |told: &&Vec<u8>| {
                let key = nf::told_key(told);
                !elements.iter().any(|e| key.is_some_and(|key| e.has_key(key)))
            };
            delete(index, found.elements_of(index).iter().filter(is_strange), &mut changes);
        }
        let base = base_chains(wanted);
        let services = wanted.services.iter().map(|service| chain_name(service.key));
        let groups = wanted.groups.iter().map(|group| group_name(group.key));
        let services: BTreeSet<String> = services.chain(groups).collect();
        let is_wanted =
            |name: &String| services.contains(name) || base.iter().any(|chain| chain.name == *name);
        for name in found.chains.keys().filter(|name| !is_wanted(name)) {
            changes.push(nf::delete_chain(TABLE, name));
            changes.extend(found.maps_of(name).map(|old| nf::delete_set(TABLE, &old)));
        }
        let unused = found.counters.keys().filter(|name| !services.contains(*name));
        changes.extend(unused.map(|name| nf::delete_counter(TABLE, name)));
        self.carry_out(changes, outcome)
    }

    /// Makes a map that nothing looks into yet, and fills it.
    fn fill_map(
        &mut self,
        service: &KernelService,
        found: &Found,
        outcome: &mut Outcome,
    ) -> io::Result<String> {
        let stem = map_name(service);
        let taken = found.looked_into();
        let numbered = (2..).map(|number| format!("{stem}_{number}"));
        let mut names = std::iter::once(stem.clone()).chain(numbered);
        let name = names.find(|name| !taken.contains(name)).unwrap_or(stem);
        let values = map_values(&service.table);
        let slots: Vec<([u8; 4], &[u8])> = slots(service, &values).collect();
        let mut changes = vec![make_map(service, &name)];
        // What one transaction has room for; without privileges that is less than a whole map.
        let lists = (self.0.batch_limit_bytes() / ELEMENT_BYTES / ELEMENT_LIMIT).max(1);
        for part in slots.chunks(ELEMENT_LIMIT * lists) {
            for list in part.chunks(ELEMENT_LIMIT) {
                let elements = list.iter().map(|(slot, value)| (&slot[..], *value));
                changes.push(nf::add_values(TABLE, &name, elements));
            }
            self.carry_out(std::mem::take(&mut changes), outcome)?;
        }
        outcome.maps += 1;
        Ok(name)
    }

    /// Whether a map holds what it should.
    fn holds(&mut self, service: &KernelService, map: &str) -> io::Result<bool> {
        let values = map_values(&service.table);
        let wanted: HashMap<[u8; 4], &[u8]> = slots(service, &values).collect();
        let (mut right, mut wrong) = (0, 0);
        self.0.stream(&nf::get_elements(TABLE, map), |reply| {
            for element in nf::told_elements(attributes(reply)) {
                let key = nf::told_key(element).and_then(<[u8]>::first_chunk);
                let value = key.and_then(|key| wanted.get(key));
                let is_right = value.is_some() && value.copied() == nf::told_value(element);
                *(if is_right { &mut right } else { &mut wrong }) += 1;
            }
        })?;
        Ok(right == wanted.len() && wrong == 0)
    }

    fn carry_out(&mut self, changes: Vec<Message>, outcome: &mut Outcome) -> io::Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        outcome.transactions += 1;
        self.commit(changes)
    }

    fn commit(&mut self, changes: Vec<Message>) -> io::Result<()> {
        self.0.batch(&nf::transaction(changes))
    }

    /// What is there; none when there is no table.
    fn read(&mut self) -> io::Result<Option<Found>> {
        match self.0.get(&nf::get_table(TABLE)) {
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => return Ok(None),
            told => drop(told?),
        }
        let mut found = Found { exists: true, ..Found::default() };
        for chain in self.0.dump(&nf::get_chains())? {
            let told = attributes(&chain);
            if is_ours(&chain, nf::CHAIN_TABLE)
                && let Some(name) = find(told, nf::CHAIN_NAME).and_then(nf::told_text)
            {
                found.chains.insert(name, told.to_vec());
            }
        }
        for rule in self.0.dump(&nf::get_rules(TABLE))? {
            let told = attributes(&rule);
            if is_ours(&rule, nf::RULE_TABLE)
                && let Some(chain) = find(told, nf::RULE_CHAIN).and_then(nf::told_text)
            {
                found.rules.entry(chain).or_default().push(told.to_vec());
            }
        }
        for set in self.0.dump(&nf::get_sets(TABLE))? {
            if is_ours(&set, nf::SET_TABLE) {
                found.sets.extend(find(attributes(&set), nf::SET_NAME).and_then(nf::told_text));
            }
        }
        for counter in self.0.dump(&nf::get_counters(TABLE))? {
            found.counters.extend(nf::told_counter(attributes(&counter)));
        }
        for index in Index::ALL.into_iter().filter(|index| found.sets.contains(index.name())) {
            let elements = found.elements.entry(index.name()).or_default();
            self.0.stream(&nf::get_elements(TABLE, index.name()), |reply| {
                elements.extend(nf::told_elements(attributes(reply)).map(<[u8]>::to_vec));
            })?;
        }
        Ok(Some(found))
    }
}

/// Each slot of a service's table with what the map holds for it.
fn slots<'a>(
    service: &KernelService,
    values: &'a [Vec<u8>],
) -> impl Iterator<Item = ([u8; 4], &'a [u8])> {
    let owners = service.table.owners().iter();
    let value = |owner: &u32| values.get(usize::try_from(*owner).ok()?).map(Vec::as_slice);
    (0u32..).zip(owners).filter_map(move |(slot, owner)| Some((slot.to_ne_bytes(), value(owner)?)))
}

/// Makes a service's chain look into this map from now on.
fn flip(service: &KernelService, map: &str) -> Vec<Message> {
    let name = chain_name(service.key);
    let rule = nf::rule(TABLE, &name, service_rule(service, map));
    vec![
        nf::make_counter(TABLE, &name),
        nf::make_chain(nf::chain_named(TABLE, &name)),
        nf::flush_chain(TABLE, &name),
        nf::append_rule(rule),
    ]
}

/// What tells a chain from others.
fn told(chain: &Chain) -> Attributes {
    match chain.hook {
        Some(hook) => nf::chain(TABLE, &chain.name, hook),
        None => nf::chain_named(TABLE, &chain.name),
    }
}

/// Makes the base chains that differ from what is wanted.
fn chains(wanted: Wanted<'_>, found: &Found) -> Vec<Message> {
    let base = base_chains(wanted);
    let differing = base.iter().filter(|chain| !found.has(chain));
    let install = |chain| install(chain, found.chains.contains_key(&chain.name));
    differing.flat_map(install).collect()
}

/// Makes a chain that elements may lead to, and puts its rules in the place of those it has.
fn refill(chain: &Chain) -> Vec<Message> {
    let rules = chain.rules.iter().map(|rule| nf::rule(TABLE, &chain.name, rule.clone()));
    let mut changes = vec![nf::make_chain(told(chain)), nf::flush_chain(TABLE, &chain.name)];
    changes.extend(rules.map(nf::append_rule));
    changes
}

/// Makes a chain with its rules, in place of what is there under its name.
fn install(chain: &Chain, is_there: bool) -> Vec<Message> {
    let mut changes = Vec::new();
    if is_there {
        changes.push(nf::delete_chain(TABLE, &chain.name));
    }
    changes.push(nf::make_chain(told(chain)));
    let rules = chain.rules.iter().map(|rule| nf::rule(TABLE, &chain.name, rule.clone()));
    changes.extend(rules.map(nf::append_rule));
    changes
}

fn add(index: Index, elements: &[Element], changes: &mut Vec<Message>) {
    let parts = elements.chunks(ELEMENT_LIMIT);
    changes.extend(parts.map(|part| nf::add_elements(TABLE, index.name(), part.to_vec())));
}

fn delete<'a>(index: Index, told: impl Iterator<Item = &'a Vec<u8>>, changes: &mut Vec<Message>) {
    let keys: Vec<Element> = told.filter_map(|told| nf::told_key(told)).map(Element::key).collect();
    let parts = keys.chunks(ELEMENT_LIMIT);
    changes.extend(parts.map(|part| nf::delete_elements(TABLE, index.name(), part.to_vec())));
}

/// Whether a message of the kernel's tells of our table.
fn is_ours(reply: &Reply, table: u16) -> bool {
    const INET: u8 = 1;
    reply.body.first() == Some(&INET)
        && find(attributes(reply), table) == Some([TABLE.as_bytes(), &[0]].concat().as_slice())
}

fn attributes(reply: &Reply) -> &[u8] {
    reply.body.get(FIXED_BYTES..).unwrap_or_default()
}
