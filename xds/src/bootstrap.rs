//! Envoy bootstrap files: static resources, and the server to ask for more.
//!
//! A configuration written for Envoy, within our subset, runs unchanged. The file is read with the
//! same translation as what comes over xDS, and with the same strictness.

use std::cell::RefCell;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use weft_model::{Name, Snapshot};

use crate::client::{Node, Variant};
use crate::located::Located;
use crate::translate::{Findings, Kind, Reader, Refused, Resource, read};
use crate::{descriptor, translate};

const MESSAGE: &str = "envoy.config.bootstrap.v3.Bootstrap";

/// A bootstrap file, read.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    /// Who we say we are to an xDS server.
    pub node: Node,
    /// The resources that stand in the file.
    pub resources: Snapshot,
    /// The server to ask for more; none: the file is all there is.
    pub ads: Option<AdsSource>,
    /// Where the admin port listens.
    pub admin: Option<SocketAddr>,
    /// Fields that are set and have no effect here.
    pub not_honoured: Vec<String>,
}

/// An aggregated discovery service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdsSource {
    /// Whether only changes are sent, or the whole state.
    pub variant: Variant,
    /// The static cluster that serves it.
    pub cluster: Name,
}

/// A mistake in a file, with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The line, from 1; 0 when the text says it.
    pub line: u64,
    /// The field and the reason.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {}: {}", self.line, self.text)
        } else {
            f.write_str(&self.text)
        }
    }
}

impl Bootstrap {
    /// Reads a bootstrap file, YAML or JSON.
    ///
    /// # Errors
    /// Every mistake that could be found, each with its line and field.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let message =
            descriptor::from_yaml(MESSAGE, text).map_err(|text| vec![Problem { line: 0, text }])?;
        let findings = RefCell::new(Findings::default());
        let mut refusals = Vec::new();
        let bootstrap = Self::read(Reader::new(message, String::new(), &findings), &mut refusals);
        let findings = findings.into_inner();
        refusals.extend(findings.refused);
        if refusals.is_empty() {
            return Ok(Self {
                not_honoured: [bootstrap.not_honoured, findings.not_honoured].concat(),
                ..bootstrap
            });
        }
        let located = Located::parse(text);
        let line = |path: &str| located.as_ref().map_or(0, |located| located.line_of(path));
        Err(refusals
            .into_iter()
            .map(|r| Problem { line: line(&r.path), text: r.to_string() })
            .collect())
    }

    fn read(mut bootstrap: Reader<'_>, refusals: &mut Vec<Refused>) -> Self {
        bootstrap.harmless(&[
            "layered_runtime",
            "stats_config",
            "stats_flush_interval",
            "overload_manager",
        ]);
        let node = bootstrap.child("node").map(node).unwrap_or_default();
        let (resources, not_honoured) = bootstrap
            .child("static_resources")
            .map(|fixed| static_resources(fixed, refusals))
            .unwrap_or_default();
        let ads = match bootstrap.child("dynamic_resources").map(ads) {
            None => None,
            Some(Ok(ads)) => Some(ads),
            Some(Err(refused)) => {
                refusals.push(refused);
                None
            }
        };
        let admin = bootstrap.child("admin").map(admin).transpose().unwrap_or_else(|refused| {
            refusals.push(refused);
            None
        });
        check(&resources, ads.as_ref(), refusals);
        Self { node, resources, ads, admin, not_honoured }
    }
}

/// Reads the resources that stand in the file, with the paths in them that nobody heeds.
fn static_resources(mut fixed: Reader<'_>, refusals: &mut Vec<Refused>) -> (Snapshot, Vec<String>) {
    let mut resources = Snapshot::default();
    let mut not_honoured = Vec::new();
    let fields =
        [("clusters", Kind::Cluster), ("secrets", Kind::Secret), ("listeners", Kind::Listener)];
    for (field, kind) in fields {
        for (index, message) in fixed.messages(field).enumerate() {
            let path = format!("static_resources.{field}[{index}]");
            let read = message.and_then(|message| {
                read(kind, message, path.clone()).map_err(|rejection| rejection.refused)
            });
            match read {
                Ok(accepted) => {
                    not_honoured.extend(accepted.not_honoured);
                    insert(&mut resources, accepted.resource, refusals, &path);
                }
                Err(refused) => refusals.push(refused),
            }
        }
    }
    (resources, not_honoured)
}

fn insert(snapshot: &mut Snapshot, resource: Resource, refusals: &mut Vec<Refused>, path: &str) {
    let name = resource.name().clone();
    if translate::insert(snapshot, resource).is_some() {
        refusals.push(Refused {
            path: format!("{path}.name"),
            reason: format!("the name {name:?} is there twice"),
        });
    }
}

/// With no server to ask, every name must be found in the file.
fn check(resources: &Snapshot, ads: Option<&AdsSource>, refusals: &mut Vec<Refused>) {
    let refuse = |path: &str, reason: String| Refused { path: path.to_owned(), reason };
    match ads {
        Some(ads) if !resources.clusters.contains_key(&ads.cluster) => refusals.push(refuse(
            "dynamic_resources.ads_config.grpc_services[0].envoy_grpc.cluster_name",
            format!("static_resources has no cluster {:?}", ads.cluster),
        )),
        Some(_) => {}
        None => {
            for missing in resources.missing() {
                if missing != weft_model::Missing::Secret(translate::WORKLOAD_IDENTITY.into()) {
                    refusals.push(refuse(
                        "static_resources",
                        format!("{missing} is referred to and not there"),
                    ));
                }
            }
        }
    }
}

fn node(mut node: Reader<'_>) -> Node {
    node.harmless(&["metadata", "locality", "user_agent_name", "client_features"]);
    Node { id: node.text("id"), cluster: node.text("cluster") }
}

fn admin(mut admin: Reader<'_>) -> Result<SocketAddr, Refused> {
    admin.harmless(&["access_log_path", "access_log", "profile_path"]);
    translate::socket(admin.required_child("address")?).map(|(address, _)| address)
}

fn ads(mut dynamic: Reader<'_>) -> Result<AdsSource, Refused> {
    for field in ["lds_config", "cds_config"] {
        if let Some(mut config) = dynamic.child(field) {
            config.harmless(&["resource_api_version", "initial_fetch_timeout"]);
            if config.child("ads").is_none() {
                return Err(config
                    .refuse("", "only ads is supported: every type comes over the one stream"));
            }
        }
    }
    let mut config = dynamic.required_child("ads_config")?;
    config.harmless(&[
        "transport_api_version",
        "set_node_on_first_message_only",
        "rate_limit_settings",
        "request_timeout",
    ]);
    let variant = match config.choice("api_type").as_str() {
        "DELTA_GRPC" | "AGGREGATED_DELTA_GRPC" => Variant::Delta,
        "GRPC" | "AGGREGATED_GRPC" => Variant::StateOfTheWorld,
        other => {
            return Err(config
                .refuse("api_type", format!("{other} is not supported; GRPC and DELTA_GRPC are")));
        }
    };
    let mut services = config.children("grpc_services");
    let Some(mut service) = services.drain(..).next() else {
        return Err(config.refuse("grpc_services", "it is empty; it names the server"));
    };
    service.harmless(&["timeout", "retry_policy"]);
    let mut grpc = service.required_child("envoy_grpc")?;
    grpc.harmless(&["authority", "retry_policy"]);
    Ok(AdsSource { variant, cluster: Arc::from(grpc.required_text("cluster_name")?) })
}

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
    fn a_file_names_its_server_and_its_resources() {
        let bootstrap = Bootstrap::parse(GOOD).expect("a good file");
        assert_eq!(bootstrap.node.id, "web-1");
        assert_eq!(
            bootstrap.ads,
            Some(AdsSource { variant: Variant::Delta, cluster: "control".into() })
        );
        assert_eq!(bootstrap.admin, Some("127.0.0.1:15000".parse().expect("an address")));
        assert_eq!(bootstrap.not_honoured, Vec::<String>::new());
    }

    #[test]
    fn every_mistake_is_told_at_once_with_its_line() {
        let text = GOOD
            .replace("cluster_name: control}}]", "cluster_name: nobody}}]")
            .replace("STRICT_DNS", "NOT_A_TYPE");
        let error = Bootstrap::parse(&text).expect_err("unknown enumeration value");
        assert!(error[0].text.contains("NOT_A_TYPE"), "{error:?}");

        let text = GOOD
            .replace("cluster_name: control}}]", "cluster_name: nobody}}]")
            .replace("type: STRICT_DNS", "type: STRICT_DNS\n    lb_policy: RANDOM")
            .replace("DELTA_GRPC", "REST");
        let problems = Bootstrap::parse(&text).expect_err("two mistakes");
        let shown: Vec<String> = problems.iter().map(ToString::to_string).collect();
        assert!(
            shown[0].contains("line 12: static_resources.clusters[0].lb_policy: RANDOM"),
            "{shown:?}"
        );
        assert!(
            shown[1].contains("line 7: dynamic_resources.ads_config.api_type: REST"),
            "{shown:?}"
        );
    }

    #[test]
    fn an_unknown_field_is_refused_with_its_line() {
        let problems =
            Bootstrap::parse(&GOOD.replace("api_type", "api_tipe")).expect_err("unknown field");
        let text = problems[0].to_string();
        assert!(text.contains("api_tipe") && text.contains("line 7"), "{text}");
    }
}
