//! Envoy bootstrap files: the node, static resources, and the xDS server.
//!
//! A configuration for Envoy that uses only supported features works unchanged. The file is translated with the same
//! code and the same strictness as resources from xDS.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use http::HeaderMap;
use prost_reflect::{DynamicMessage, Value};
use tonic::metadata::{AsciiMetadataKey, BinaryMetadataKey, MetadataMap, MetadataValue};
use weft_model::{MissingReference, Name, Snapshot};

use crate::client::{XdsNode, XdsVariant};
use crate::located::{ConfigError, Located};
use crate::translate::{
    FieldError, MessageReader, Notes, Resource, ResourceKind, TranslationFindings, read,
};
use crate::{json_form, translate};

const MESSAGE: &str = "envoy.config.bootstrap.v3.Bootstrap";

/// A parsed bootstrap file.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    /// The node that is sent to the xDS server.
    pub node: XdsNode,
    /// The static resources.
    pub resources: Snapshot,
    /// The xDS server; none: the static resources are the whole configuration.
    pub ads: Option<AdsSource>,
    /// The address of the admin port.
    pub admin: Option<SocketAddr>,
    /// Settings without effect and settings that weaken security.
    pub notes: Notes,
}

/// An aggregated discovery service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdsSource {
    /// The variant of the xDS protocol.
    pub variant: XdsVariant,
    /// The static cluster that serves it.
    pub cluster: Name,
    /// The gRPC metadata of each stream (`initial_metadata`), such as a token.
    pub metadata: HeaderMap,
}

impl Bootstrap {
    /// Parses a bootstrap file, YAML or JSON.
    ///
    /// # Errors
    /// All errors that were found, each with its line and field.
    pub fn parse(text: &str) -> Result<Self, Vec<ConfigError>> {
        let located = Located::parse(text).map_err(|text| vec![ConfigError { line: 0, text }])?;
        let (message, mistakes) = json_form::read(MESSAGE, &located);
        let mut refusals = Refusals { malformed: mistakes.len(), ..Refusals::default() };
        refusals.all = mistakes;
        let findings = RefCell::new(TranslationFindings::default());
        let read = |message| {
            Self::read(MessageReader::new(message, String::new(), &findings), &mut refusals)
        };
        let bootstrap = message.map(read);
        let findings = findings.into_inner();
        refusals.all.extend(findings.refused);
        match bootstrap {
            Some(mut bootstrap) if refusals.all.is_empty() => {
                bootstrap.notes.extend(findings.notes);
                Ok(bootstrap)
            }
            _ => {
                let problem = |r: FieldError| ConfigError {
                    line: located.line_of(&r.path),
                    text: r.to_string(),
                };
                let mut problems: Vec<ConfigError> =
                    refusals.all.into_iter().map(problem).collect();
                problems.sort_by_key(|problem| problem.line);
                Err(problems)
            }
        }
    }

    fn read(mut bootstrap: MessageReader<'_>, refusals: &mut Refusals) -> Self {
        let node = bootstrap.child("node").map(node).unwrap_or_default();
        let mut notes = Notes::default();
        let resources = bootstrap
            .child("static_resources")
            .map(|fixed| static_resources(fixed, refusals, &mut notes))
            .unwrap_or_default();
        let is_dynamic = bootstrap.has("dynamic_resources");
        let ads = refusals.section(&mut bootstrap, "dynamic_resources", ads);
        let admin = refusals.section(&mut bootstrap, "admin", admin);
        match &ads {
            Some(ads) => refusals.check_server(&resources, ads),
            None if !is_dynamic => refusals.check_references(&resources),
            None => {}
        }
        Self { node, resources, ads, admin, notes }
    }
}

/// The errors of a file, and the names that must not be reported as missing because of them.
#[derive(Default)]
struct Refusals {
    all: Vec<FieldError>,
    /// How many of them are syntax errors: the first ones.
    malformed: usize,
    /// The names of resources that are in the file and were refused.
    names: BTreeSet<String>,
}

impl Refusals {
    /// Whether a part of the file has a syntax error, so that fields may be missing because of it.
    fn is_malformed(&self, path: &str) -> bool {
        let forms = self.all.iter().take(self.malformed);
        forms
            .filter_map(|mistake| mistake.path.strip_prefix(path))
            .any(|rest| rest.is_empty() || rest.starts_with('.') || rest.starts_with('['))
    }

    /// Reads a section of the file, unless it has a syntax error.
    fn section<'f, T>(
        &mut self,
        bootstrap: &mut MessageReader<'f>,
        field: &str,
        read: impl Fn(MessageReader<'f>) -> Result<T, FieldError>,
    ) -> Option<T> {
        let section = bootstrap.child(field).filter(|_| !self.is_malformed(field))?;
        read(section).map_err(|refused| self.all.push(refused)).ok()
    }

    fn insert(&mut self, snapshot: &mut Snapshot, resource: Resource, path: &str) {
        if let Some(name) = translate::insert(snapshot, resource) {
            let reason = format!("invalid name {name:?}: another resource has the same name");
            self.all.push(FieldError { path: format!("{path}.name"), reason });
        }
    }

    /// Checks that the cluster of the xDS server is in the file, and verifies the server's certificate when it uses TLS:
    /// a server that impersonates it could set every policy.
    fn check_server(&mut self, resources: &Snapshot, ads: &AdsSource) {
        const PATH: &str = "dynamic_resources.ads_config.grpc_services[0].envoy_grpc.cluster_name";
        let Some(cluster) = resources.clusters.get(&ads.cluster) else {
            return self.refuse_missing(PATH, &MissingReference::Cluster(ads.cluster.clone()));
        };
        if cluster.tls.as_ref().is_some_and(|tls| tls.validation.is_none()) {
            let reason = format!(
                "invalid cluster {:?}: TLS to an xDS server must have trusted_ca, otherwise any \
                 server could set the configuration",
                ads.cluster
            );
            self.all.push(FieldError { path: PATH.to_owned(), reason });
        }
    }

    /// Checks, without an xDS server, that every referenced name is in the file.
    fn check_references(&mut self, resources: &Snapshot) {
        let identity = MissingReference::Secret(translate::WORKLOAD_IDENTITY.into());
        for missing in resources.missing().iter().filter(|missing| **missing != identity) {
            self.refuse_missing("static_resources", missing);
        }
    }

    fn refuse_missing(&mut self, path: &str, missing: &MissingReference) {
        let (MissingReference::Routes(name)
        | MissingReference::Cluster(name)
        | MissingReference::Endpoints(name)
        | MissingReference::Addresses(name)
        | MissingReference::Secret(name)) = missing;
        if !self.names.contains(&**name) {
            let reason = format!("missing {missing}: a resource refers to it");
            self.all.push(FieldError { path: path.to_owned(), reason });
        }
    }
}

/// Reads the static resources.
fn static_resources(
    mut fixed: MessageReader<'_>,
    refusals: &mut Refusals,
    notes: &mut Notes,
) -> Snapshot {
    let mut resources = Snapshot::default();
    let fields = [
        ("clusters", ResourceKind::Cluster),
        ("secrets", ResourceKind::Secret),
        ("listeners", ResourceKind::Listener),
    ];
    for (field, kind) in fields {
        for (index, message) in fixed.messages(field).enumerate() {
            let path = format!("static_resources.{field}[{index}]");
            let message = match message {
                Ok(message) => named(kind, message, index),
                Err(refused) => {
                    refusals.all.push(refused);
                    continue;
                }
            };
            if refusals.is_malformed(&path) {
                refusals.names.insert(translate::name_of(kind, &message));
                continue;
            }
            match read(kind, message, path.clone()) {
                Ok(accepted) => {
                    notes.extend(accepted.notes);
                    refusals.insert(&mut resources, accepted.resource, &path);
                }
                Err(rejection) => {
                    refusals.names.insert(rejection.name);
                    refusals.all.push(rejection.error);
                }
            }
        }
    }
    resources
}

/// Names a listener without a name by its index in the file. Envoy generates a UUID, which is less useful in logs and
/// changes with every start.
fn named(kind: ResourceKind, mut message: DynamicMessage, index: usize) -> DynamicMessage {
    if kind == ResourceKind::Listener && translate::name_of(kind, &message).is_empty() {
        message.set_field_by_name("name", Value::String(format!("listeners[{index}]")));
    }
    message
}

fn node(mut node: MessageReader<'_>) -> XdsNode {
    // The client sets its own user agent.
    node.harmless(&["user_agent_name", "user_agent_version", "user_agent_build_version"]);
    XdsNode { id: node.text("id"), cluster: node.text("cluster"), described: node.into_bytes() }
}

fn admin(mut admin: MessageReader<'_>) -> Result<SocketAddr, FieldError> {
    translate::socket(admin.required_child("address")?).map(|(address, _)| address)
}

fn ads(mut dynamic: MessageReader<'_>) -> Result<AdsSource, FieldError> {
    for field in ["lds_config", "cds_config"] {
        if let Some(mut config) = dynamic.child(field) {
            config.harmless(&["resource_api_version"]);
            if config.child("ads").is_none() {
                return Err(
                    config.refuse("", "only ads is supported: all types use one aggregated stream")
                );
            }
        }
    }
    let mut config = dynamic.required_child("ads_config")?;
    config.harmless(&["transport_api_version", "set_node_on_first_message_only"]);
    let variant = match config.choice("api_type").as_str() {
        "DELTA_GRPC" | "AGGREGATED_DELTA_GRPC" => XdsVariant::Delta,
        "GRPC" | "AGGREGATED_GRPC" => XdsVariant::StateOfTheWorld,
        other => {
            return Err(config.refuse(
                "api_type",
                format!("unsupported API type {other}: must be GRPC or DELTA_GRPC"),
            ));
        }
    };
    let mut services = config.children("grpc_services");
    let Some(mut service) = services.drain(..).next() else {
        return Err(config.refuse("grpc_services", "must name the xDS server"));
    };
    let metadata = initial_metadata(service.children("initial_metadata"))?;
    let mut grpc = service.required_child("envoy_grpc")?;
    Ok(AdsSource { variant, cluster: Arc::from(grpc.required_text("cluster_name")?), metadata })
}

/// Reads the `HeaderValue`s for the metadata of each stream.
fn initial_metadata(values: Vec<MessageReader<'_>>) -> Result<HeaderMap, FieldError> {
    let mut metadata = MetadataMap::new();
    for mut header in values {
        let name = header.required_text("key")?.to_ascii_lowercase();
        let mut value = header.text("value").into_bytes();
        if value.is_empty() {
            value = header.bytes("raw_value");
        }
        // Errors may show the key, never the value: it may be a token.
        if RESERVED.contains(&name.as_str()) {
            let reason = format!("invalid metadata key {name:?}: gRPC sets it");
            return Err(header.refuse("key", reason));
        }
        if name.ends_with("-bin") {
            let key = BinaryMetadataKey::from_bytes(name.as_bytes())
                .map_err(|_| header.refuse("key", format!("invalid metadata key {name:?}")))?;
            metadata.append_bin(key, MetadataValue::from_bytes(&value));
            continue;
        }
        let key = AsciiMetadataKey::from_bytes(name.as_bytes())
            .map_err(|_| header.refuse("key", format!("invalid metadata key {name:?}")))?;
        let mut value = MetadataValue::try_from(value.as_slice())
            .map_err(|_| header.refuse("value", "invalid metadata value: expected ASCII text"))?;
        value.set_sensitive(true);
        metadata.append(key, value);
    }
    Ok(metadata.into_headers())
}

/// Headers that gRPC sets itself.
const RESERVED: [&str; 5] =
    ["te", "content-type", "grpc-message", "grpc-message-type", "grpc-status"];

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
node: {id: web-1, cluster: web}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 15000}}}
dynamic_resources:
  lds_config: {ads: {}, resource_api_version: V3}
  cds_config: {ads: {}, resource_api_version: V3}
  ads_config: {api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: control}}]}
static_resources:
  clusters:
  - name: control
    type: STRICT_DNS
    http2_protocol_options: {}
    load_assignment: {cluster_name: control, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: control, port_value: 15010}}}}]}]}
"#;

    #[test]
    fn server_and_resources_of_a_file_are_read() {
        let bootstrap = Bootstrap::parse(GOOD).expect("a good file");
        assert_eq!(bootstrap.node.id, "web-1");
        assert_eq!(
            bootstrap.ads,
            Some(AdsSource {
                variant: XdsVariant::Delta,
                cluster: "control".into(),
                metadata: HeaderMap::new(),
            })
        );
        assert_eq!(bootstrap.admin, Some("127.0.0.1:15000".parse().expect("an address")));
        assert_eq!(bootstrap.notes, Notes::default());
    }

    #[test]
    fn all_errors_are_reported_in_the_order_of_lines() {
        let text = GOOD
            .replace("cluster_name: control}}]", "cluster_name: absent}}]")
            .replace("STRICT_DNS", "NOT_A_TYPE");
        let lines = |text: &str| -> Vec<String> {
            let problems = Bootstrap::parse(text).expect_err("mistakes");
            problems.iter().map(ToString::to_string).collect()
        };
        let shown = lines(&text);
        assert_eq!(shown.len(), 2, "{shown:?}");
        assert!(shown[0].contains("line 7: ") && shown[0].contains("missing cluster \"absent\""));
        assert!(shown[1].contains("line 11: static_resources.clusters[0].type: invalid value"));

        let text = GOOD
            .replace("type: STRICT_DNS", "type: STRICT_DNS\n    lb_policy: CLUSTER_PROVIDED")
            .replace("DELTA_GRPC", "REST");
        let shown = lines(&text);
        assert_eq!(shown.len(), 2, "{shown:?}");
        let api_type = "line 7: dynamic_resources.ads_config.api_type: unsupported API type REST";
        assert!(shown[0].contains(api_type), "{shown:?}");
        let policy = "line 12: static_resources.clusters[0].lb_policy: unsupported policy";
        assert!(shown[1].contains(policy), "{shown:?}");

        // A reference to a refused resource is not reported in addition.
        let shown = lines(&GOOD.replace("type: STRICT_DNS", "type: 77"));
        assert_eq!(shown.len(), 1, "{shown:?}");
    }

    #[test]
    fn listeners_without_names_are_named_by_their_index() {
        let listener = |port: u16, name: &str| {
            format!(
                "  - {{{name} use_original_dst: true, address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}\n"
            )
        };
        let listeners = [listener(1, ""), listener(2, "name: b,"), listener(3, "name: '',")];
        let text = format!("{GOOD}  listeners:\n{}", listeners.concat());
        let resources = Bootstrap::parse(&text).expect("a good file").resources;
        let names: Vec<&str> = resources.listeners.keys().map(|name| &**name).collect();
        assert_eq!(names, ["b", "listeners[0]", "listeners[2]"]);
    }

    #[test]
    fn reserved_metadata_is_refused_and_values_are_not_shown() {
        let with = |header: &str| {
            let from = "{envoy_grpc: {cluster_name: control}}";
            let to =
                format!("{{envoy_grpc: {{cluster_name: control}}, initial_metadata: [{header}]}}");
            Bootstrap::parse(&GOOD.replace(from, &to))
        };
        let ads = with("{key: Authorization, value: Bearer x}").expect("a good file").ads;
        let metadata = ads.expect("a server").metadata;
        assert_eq!(metadata.get("authorization").expect("the header is set"), "Bearer x");
        assert!(!format!("{metadata:?}").contains("Bearer"), "{metadata:?}");
        for (header, reason) in [
            ("{key: grpc-status, value: x}", "gRPC sets it"),
            ("{key: 'a b', value: x}", "invalid metadata key \"a b\""),
            ("{key: a, value: \"secret\\n\"}", "invalid metadata value"),
        ] {
            let problems = with(header).expect_err("refused");
            assert!(problems[0].text.contains(reason), "{problems:?}");
            assert!(!problems[0].text.contains("secret"), "{problems:?}");
        }
    }

    #[test]
    fn unknown_field_is_refused_with_its_line() {
        let problems =
            Bootstrap::parse(&GOOD.replace("api_type", "api_tipe")).expect_err("unknown field");
        let text = problems[0].to_string();
        assert!(text.contains("api_tipe") && text.contains("line 7"), "{text}");
    }
}
