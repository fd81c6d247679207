//! The resources of one response: which are good, which are refused and why.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use envoy_types::pb::google::protobuf::Any;
use prost::Message as _;
use weft_model::Name;

use crate::translate::{self, FieldError, Rejection, ResourceKind};

/// The resources of one response, sorted into good and bad.
pub(super) struct Batch {
    pub(super) kind: ResourceKind,
    pub(super) good: BTreeMap<Name, (String, translate::DecodedResource)>,
    pub(super) bad: Vec<Rejection>,
}

impl Batch {
    pub(super) fn new(kind: ResourceKind) -> Self {
        Self { kind, good: BTreeMap::new(), bad: Vec::new() }
    }

    /// Reads one resource, of which the message around it gave a name or an empty text. A state-of-the-world server
    /// may wrap it in a `Resource`.
    pub(super) fn take(&mut self, name: &str, any: &Any, version: String) {
        type Wrapper = envoy_types::pb::envoy::service::discovery::v3::Resource;
        if any.type_url.ends_with("/envoy.service.discovery.v3.Resource")
            && let Ok(Wrapper { name, resource: Some(any), .. }) =
                Wrapper::decode(any.value.as_slice())
        {
            return self.read(&name, &any, version);
        }
        self.read(name, any, version);
    }

    fn read(&mut self, outer_name: &str, any: &Any, version: String) {
        let kind = self.kind;
        let refuse = |name: String, reason: String| Rejection {
            kind,
            name,
            error: FieldError { path: String::new(), reason },
        };
        if any.type_url != kind.type_url() {
            self.bad.push(refuse(
                outer_name.to_owned(),
                format!("a {:?} in a response of {}", any.type_url, kind.type_url()),
            ));
            return;
        }
        match translate::decode(kind, &any.value) {
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
            Err(mut rejection) => {
                if rejection.name.is_empty() {
                    outer_name.clone_into(&mut rejection.name);
                }
                self.bad.push(rejection);
            }
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
