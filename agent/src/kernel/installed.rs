//! Reads the table that is installed in the kernel, and compares it with the desired one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use nix::errno::Errno;

use super::desired::{TABLE, chain_name};
use super::service::KernelService;
use super::table::{KernelChain, map_name, service_rule};
use super::table_sets::TableSet;
use crate::netlink::nf_tables::{self as nf, ElementKeys, Expression, SetElement};
use crate::netlink::{Attributes, Netlink, NetlinkReply, find};

/// The length of the fixed part before the attributes.
const FIXED_BYTES: usize = 4;

/// The table as it is installed.
#[derive(Debug, Default)]
pub(super) struct InstalledTable {
    pub(super) exists: bool,
    /// The encoded attributes of each chain.
    pub(super) chains: BTreeMap<String, Vec<u8>>,
    /// The encoded rules of each chain, in order.
    rules: BTreeMap<String, Vec<Vec<u8>>>,
    pub(super) sets: BTreeSet<String>,
    pub(super) counters: BTreeMap<String, u64>,
    /// The sets that rules use.
    pub(super) referenced_sets: BTreeSet<String>,
    /// The encoded elements of each set.
    elements: BTreeMap<&'static str, BTreeMap<ElementKeys, Vec<u8>>>,
}

/// How the elements of a set differ from the desired ones.
#[derive(Debug, Default)]
pub(super) struct ElementDiff {
    pub(super) missing: Vec<SetElement>,
    /// Keys of elements with other data.
    pub(super) changed: Vec<ElementKeys>,
    /// Keys of elements that are not desired.
    pub(super) extra: Vec<ElementKeys>,
}

impl InstalledTable {
    /// Reads the installed table; `None` when the table does not exist.
    pub(super) fn read(kernel: &mut Netlink) -> io::Result<Option<Self>> {
        match kernel.get(&nf::get_table(TABLE)) {
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => return Ok(None),
            described => drop(described?),
        }
        let mut installed = Self { exists: true, ..Self::default() };
        for chain in kernel.dump(&nf::get_chains())? {
            let described = attributes(&chain);
            if is_in_our_table(&chain, nf::CHAIN_TABLE)
                && let Some(name) = find(described, nf::CHAIN_NAME).and_then(nf::parse_text)
            {
                installed.chains.insert(name, described.to_vec());
            }
        }
        for rule in kernel.dump(&nf::get_rules(TABLE))? {
            let described = attributes(&rule);
            if is_in_our_table(&rule, nf::RULE_TABLE)
                && let Some(chain) = find(described, nf::RULE_CHAIN).and_then(nf::parse_text)
            {
                installed.rules.entry(chain).or_default().push(described.to_vec());
            }
        }
        let rules = installed.rules.values().flatten();
        installed.referenced_sets = rules.flat_map(|rule| nf::parse_lookups(rule)).collect();
        for set in kernel.dump(&nf::get_sets(TABLE))? {
            if is_in_our_table(&set, nf::SET_TABLE) {
                installed
                    .sets
                    .extend(find(attributes(&set), nf::SET_NAME).and_then(nf::parse_text));
            }
        }
        for counter in kernel.dump(&nf::get_counters(TABLE))? {
            installed.counters.extend(nf::parse_counter(attributes(&counter)));
        }
        for index in TableSet::all().filter(|index| installed.sets.contains(index.name())) {
            let elements = installed.elements.entry(index.name()).or_default();
            kernel.stream(&nf::get_elements(TABLE, index.name()), |reply| {
                let described = nf::parse_elements(attributes(reply));
                elements.extend(described.filter_map(|described| {
                    Some((ElementKeys::parse(described)?, described.to_vec()))
                }));
            })?;
        }
        Ok(Some(installed))
    }
    fn rules_of(&self, chain: &str) -> &[Vec<u8>] {
        self.rules.get(chain).map_or(&[], Vec::as_slice)
    }

    /// The encoded element with these keys.
    fn element(&self, index: TableSet, keys: &ElementKeys) -> Option<&[u8]> {
        self.elements.get(index.name())?.get(keys).map(Vec::as_slice)
    }

    pub(super) fn has_element(&self, index: TableSet, element: &SetElement) -> bool {
        self.element(index, &element.keys).is_some_and(|described| element.is(described))
    }

    pub(super) fn diff(&self, index: TableSet, desired: &[SetElement]) -> ElementDiff {
        let mut diff = ElementDiff::default();
        for element in desired {
            match self.element(index, &element.keys) {
                Some(described) if element.is(described) => continue,
                Some(_) => diff.changed.push(element.keys.clone()),
                None => {}
            }
            diff.missing.push(element.clone());
        }
        let desired: BTreeSet<&ElementKeys> = desired.iter().map(|element| &element.keys).collect();
        let there = self.elements.get(index.name()).into_iter().flat_map(BTreeMap::keys);
        diff.extra.extend(there.filter(|keys| !desired.contains(keys)).cloned());
        diff
    }

    /// Maps that no rule uses.
    pub(super) fn unreferenced_maps(&self) -> Vec<String> {
        let is_leftover = |name: &&String| !self.referenced_sets.contains(*name) && !is_index(name);
        self.sets.iter().filter(is_leftover).cloned().collect()
    }

    /// The maps that the rules of a chain use.
    pub(super) fn maps_of(&self, chain: &str) -> impl Iterator<Item = String> {
        let maps: BTreeSet<String> =
            self.rules_of(chain).iter().flat_map(|rule| nf::parse_lookups(rule)).collect();
        maps.into_iter().filter(|name| !is_index(name) && self.sets.contains(name))
    }

    /// The map of a service, if the chain of the service is as desired.
    pub(super) fn map_of(&self, service: &KernelService) -> Option<String> {
        let name = chain_name(service.key);
        let [rule] = self.rules_of(&name) else { return None };
        let map = nf::parse_lookups(rule).next()?;
        let desired = nf::rule(TABLE, &name, service_rule(service, &map));
        (map.starts_with(&map_name(service)) && desired.is_contained_in(rule)).then_some(map)
    }

    pub(super) fn has(&self, chain: &KernelChain) -> bool {
        let desired = described(chain);
        let rules = self.rules_of(&chain.name);
        let same_rule = |(rule, described): (&Vec<Expression>, &Vec<u8>)| {
            nf::rule(TABLE, &chain.name, rule.clone()).is_contained_in(described)
        };
        self.chains.get(&chain.name).is_some_and(|described| desired.is_contained_in(described))
            && rules.len() == chain.rules.len()
            && chain.rules.iter().zip(rules).all(same_rule)
    }
}

/// Whether a set is not the map of a service: it is a set of the table, or an anonymous set in a rule.
fn is_index(set: &str) -> bool {
    set.starts_with("__") || TableSet::all().any(|index| index.name() == set)
}

/// The attributes of a chain.
pub(super) fn described(chain: &KernelChain) -> Attributes {
    match chain.hook {
        Some(hook) => nf::chain(TABLE, &chain.name, hook),
        None => nf::chain_named(TABLE, &chain.name),
    }
}

/// Whether a message describes our table.
fn is_in_our_table(reply: &NetlinkReply, table: u16) -> bool {
    const INET: u8 = 1;
    reply.body.first() == Some(&INET)
        && find(attributes(reply), table) == Some([TABLE.as_bytes(), &[0]].concat().as_slice())
}

pub(super) fn attributes(reply: &NetlinkReply) -> &[u8] {
    reply.body.get(FIXED_BYTES..).unwrap_or_default()
}
