//! Decodes the resources of one response into accepted and rejected ones.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use envoy_types::pb::google::protobuf::Any;
use prost::Message as _;
use weft_model::Name;

use crate::translate::{self, FieldError, Rejection, ResourceKind};

/// The resources of one response, decoded.
pub(super) struct Batch {
    pub(super) kind: ResourceKind,
    pub(super) good: BTreeMap<Name, (String, translate::DecodedResource)>,
    pub(super) bad: Vec<Rejection>,
}

impl Batch {
    pub(super) fn new(kind: ResourceKind) -> Self {
        Self { kind, good: BTreeMap::new(), bad: Vec::new() }
    }

    /// Decodes one resource. `name` is the name in the message around it; it may be empty. A state-of-the-world server
    /// may wrap the resource in a `Resource`.
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
                format!(
                    "invalid type {:?}: must be {}, the response's type",
                    any.type_url,
                    kind.type_url()
                ),
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
                        "duplicate name in the response".into(),
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

    /// Every name in the response, including rejected resources: those are not deleted.
    pub(super) fn names(&self) -> impl Iterator<Item = Name> {
        self.good
            .keys()
            .cloned()
            .chain(self.bad.iter().map(|r| Name::from(r.name.as_str())))
            .collect::<Vec<_>>()
            .into_iter()
    }
}
