//! What is there of ours in the kernel, and how it differs from what is wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use nix::errno::Errno;

use super::index::{Index, chain_name};
use super::service::KernelService;
use super::table::{Chain, TABLE, map_name, service_rule};
use crate::netlink::nf_tables::{self as nf, Element, Expression, Keys};
use crate::netlink::{Attributes, Netlink, Reply, find};

/// Before a message's attributes.
const FIXED_BYTES: usize = 4;

/// What is there of ours.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) exists: bool,
    /// Each chain, as the kernel tells it.
    pub(super) chains: BTreeMap<String, Vec<u8>>,
    /// The rules of each chain, in order.
    rules: BTreeMap<String, Vec<Vec<u8>>>,
    pub(super) sets: BTreeSet<String>,
    pub(super) counters: BTreeMap<String, u64>,
    /// The sets that rules look into.
    pub(super) looked_into: BTreeSet<String>,
    /// The elements of each index, as the kernel tells them.
    elements: BTreeMap<&'static str, BTreeMap<Keys, Vec<u8>>>,
}

/// How what an index holds differs from what it is to hold.
#[derive(Debug, Default)]
pub(super) struct Difference {
    pub(super) missing: Vec<Element>,
    /// Of those that lead elsewhere.
    pub(super) other: Vec<Keys>,
    /// Of those that are not wanted.
    pub(super) strange: Vec<Keys>,
}

impl Found {
    /// What is there; none when there is no table.
    pub(super) fn read(kernel: &mut Netlink) -> io::Result<Option<Self>> {
        match kernel.get(&nf::get_table(TABLE)) {
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => return Ok(None),
            told => drop(told?),
        }
        let mut found = Self { exists: true, ..Self::default() };
        for chain in kernel.dump(&nf::get_chains())? {
            let told = attributes(&chain);
            if is_ours(&chain, nf::CHAIN_TABLE)
                && let Some(name) = find(told, nf::CHAIN_NAME).and_then(nf::told_text)
            {
                found.chains.insert(name, told.to_vec());
            }
        }
        for rule in kernel.dump(&nf::get_rules(TABLE))? {
            let told = attributes(&rule);
            if is_ours(&rule, nf::RULE_TABLE)
                && let Some(chain) = find(told, nf::RULE_CHAIN).and_then(nf::told_text)
            {
                found.rules.entry(chain).or_default().push(told.to_vec());
            }
        }
        let rules = found.rules.values().flatten();
        found.looked_into = rules.flat_map(|rule| nf::told_lookups(rule)).collect();
        for set in kernel.dump(&nf::get_sets(TABLE))? {
            if is_ours(&set, nf::SET_TABLE) {
                found.sets.extend(find(attributes(&set), nf::SET_NAME).and_then(nf::told_text));
            }
        }
        for counter in kernel.dump(&nf::get_counters(TABLE))? {
            found.counters.extend(nf::told_counter(attributes(&counter)));
        }
        for index in Index::all().filter(|index| found.sets.contains(index.name())) {
            let elements = found.elements.entry(index.name()).or_default();
            kernel.stream(&nf::get_elements(TABLE, index.name()), |reply| {
                let told = nf::told_elements(attributes(reply));
                elements.extend(told.filter_map(|told| Some((Keys::told(told)?, told.to_vec()))));
            })?;
        }
        Ok(Some(found))
    }
    fn rules_of(&self, chain: &str) -> &[Vec<u8>] {
        self.rules.get(chain).map_or(&[], Vec::as_slice)
    }

    /// What an index holds for these keys.
    fn element(&self, index: Index, keys: &Keys) -> Option<&[u8]> {
        self.elements.get(index.name())?.get(keys).map(Vec::as_slice)
    }

    pub(super) fn has_element(&self, index: Index, element: &Element) -> bool {
        self.element(index, &element.keys).is_some_and(|told| element.is(told))
    }

    pub(super) fn difference(&self, index: Index, wanted: &[Element]) -> Difference {
        let mut difference = Difference::default();
        for element in wanted {
            match self.element(index, &element.keys) {
                Some(told) if element.is(told) => continue,
                Some(_) => difference.other.push(element.keys.clone()),
                None => {}
            }
            difference.missing.push(element.clone());
        }
        let wanted: BTreeSet<&Keys> = wanted.iter().map(|element| &element.keys).collect();
        let there = self.elements.get(index.name()).into_iter().flat_map(BTreeMap::keys);
        difference.strange.extend(there.filter(|keys| !wanted.contains(keys)).cloned());
        difference
    }

    /// Maps that no rule looks into.
    pub(super) fn leftovers(&self) -> Vec<String> {
        let is_leftover = |name: &&String| !self.looked_into.contains(*name) && !is_index(name);
        self.sets.iter().filter(is_leftover).cloned().collect()
    }

    /// The maps that a chain's rules look into.
    pub(super) fn maps_of(&self, chain: &str) -> impl Iterator<Item = String> {
        let maps: BTreeSet<String> =
            self.rules_of(chain).iter().flat_map(|rule| nf::told_lookups(rule)).collect();
        maps.into_iter().filter(|name| !is_index(name) && self.sets.contains(name))
    }

    /// The map of a service, when its chain is as wanted.
    pub(super) fn map_of(&self, service: &KernelService) -> Option<String> {
        let name = chain_name(service.key);
        let [rule] = self.rules_of(&name) else { return None };
        let map = nf::told_lookups(rule).next()?;
        let wanted = nf::rule(TABLE, &name, service_rule(service, &map));
        (map.starts_with(&map_name(service)) && wanted.are_in(rule)).then_some(map)
    }

    pub(super) fn has(&self, chain: &Chain) -> bool {
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

/// Whether a set is no service's map: an index, or one that stands in somebody's rule.
fn is_index(set: &str) -> bool {
    set.starts_with("__") || Index::all().any(|index| index.name() == set)
}

/// What tells a chain from others.
pub(super) fn told(chain: &Chain) -> Attributes {
    match chain.hook {
        Some(hook) => nf::chain(TABLE, &chain.name, hook),
        None => nf::chain_named(TABLE, &chain.name),
    }
}

/// Whether a message of the kernel's tells of our table.
fn is_ours(reply: &Reply, table: u16) -> bool {
    const INET: u8 = 1;
    reply.body.first() == Some(&INET)
        && find(attributes(reply), table) == Some([TABLE.as_bytes(), &[0]].concat().as_slice())
}

pub(super) fn attributes(reply: &Reply) -> &[u8] {
    reply.body.get(FIXED_BYTES..).unwrap_or_default()
}
