//! The resources of one response: which are good, which are refused and why.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use weft_model::Name;

use crate::translate::{self, Kind, Refused, Rejection};

/// The resources of one response, sorted into good and bad.
pub(super) struct Batch {
    pub(super) kind: Kind,
    pub(super) good: BTreeMap<Name, (String, translate::Accepted)>,
    pub(super) bad: Vec<Rejection>,
}

impl Batch {
    pub(super) fn new(kind: Kind) -> Self {
        Self { kind, good: BTreeMap::new(), bad: Vec::new() }
    }

    /// Reads one resource. A state-of-the-world server may wrap it in a `Resource`.
    pub(super) fn take(&mut self, type_url: &str, bytes: &[u8], version: String) {
        use prost::Message as _;
        type Wrapper = envoy_types::pb::envoy::service::discovery::v3::Resource;
        if type_url.ends_with("/envoy.service.discovery.v3.Resource")
            && let Ok(Wrapper { resource: Some(any), .. }) = Wrapper::decode(bytes)
        {
            return self.read(&any.type_url, &any.value, version);
        }
        self.read(type_url, bytes, version);
    }

    fn read(&mut self, type_url: &str, bytes: &[u8], version: String) {
        let kind = self.kind;
        let refuse = |name: String, reason: String| Rejection {
            kind,
            name,
            refused: Refused { path: String::new(), reason },
        };
        if type_url != kind.type_url() {
            self.bad.push(refuse(
                String::new(),
                format!("a {type_url:?} in a response of {}", kind.type_url()),
            ));
            return;
        }
        match translate::decode(kind, bytes) {
            Ok(accepted) => {
                let name = accepted.resource.name().clone();
                match self.good.entry(name) {
                    Entry::Vacant(entry) => {
                        entry.insert((version, accepted));
                    }
                    Entry::Occupied(entry) => self.bad.push(refuse(
                        entry.key().to_string(),
                        "the response holds this name twice".into(),
                    )),
                }
            }
            Err(rejection) => self.bad.push(rejection),
        }
    }

    /// Every name in the response, good or bad: a bad one is not a deleted one.
    pub(super) fn names(&self) -> impl Iterator<Item = Name> {
        self.good
            .keys()
            .cloned()
            .chain(self.bad.iter().map(|r| Name::from(r.name.as_str())))
            .collect::<Vec<_>>()
            .into_iter()
    }
}
