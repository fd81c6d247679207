//! The redirects file: which redirects to maintain on a node, per network namespace.
//!
//! ```yaml
//! redirects:
//! - netns: /run/netns/web          # default: the namespace of this process
//!   inbound: 15006
//!   outbound: 15001
//!   services: [10.96.0.0/16, "fd96::/64"]
//! - forwarded: 15001
//!   udp: 15099
//!   services: [10.96.0.0/16, "fd96::/64"]
//! ```

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use weft_agent::kernel;
use weft_agent::redirect::{
    self, BackendChoice, DesiredRedirects, Namespace, RedirectBackend, RedirectConfig,
    RedirectError, RedirectGuard,
};
use weft_model::Cidr;
use weft_runtime::socket::Mark;
use weft_xds::located::ConfigError;
use weft_xds::located::Located;

/// The interval at which the file is checked for changes.
const POLL: Duration = Duration::from_millis(500);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRedirectFile {
    redirects: Vec<RawRedirect>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRedirect {
    netns: Option<PathBuf>,
    #[serde(default)]
    backend: RawBackend,
    owner: Option<String>,
    inbound: Option<u16>,
    outbound: Option<u16>,
    forwarded: Option<u16>,
    udp: Option<u16>,
    #[serde(default)]
    services: Vec<String>,
    dns: Option<u16>,
    #[serde(default)]
    resolvers: Vec<IpAddr>,
    #[serde(default)]
    exclude_inbound_ports: Vec<u16>,
    #[serde(default)]
    exclude_outbound_ports: Vec<u16>,
    #[serde(default)]
    exclude_destinations: Vec<String>,
    #[serde(default)]
    exclude_interfaces: Vec<String>,
    #[serde(default)]
    exclude_users: Vec<u32>,
    #[serde(default)]
    strict: bool,
    #[serde(default)]
    keep_source: bool,
    uid: Option<u32>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawBackend {
    #[default]
    Auto,
    Native,
    Nft,
    Iptables,
}

impl From<RawBackend> for BackendChoice {
    fn from(raw: RawBackend) -> Self {
        match raw {
            RawBackend::Auto => Self::Auto,
            RawBackend::Native => Self::Only(RedirectBackend::Native),
            RawBackend::Nft => Self::Only(RedirectBackend::Nft),
            RawBackend::Iptables => Self::Only(RedirectBackend::Iptables),
        }
    }
}

/// Parses a redirects file.
///
/// # Errors
/// All errors in the text, each with its line and field path.
pub fn parse(text: &str) -> Result<Vec<DesiredRedirects>, Vec<ConfigError>> {
    let raw: RawRedirectFile = serde_saphyr::from_str(text)
        .map_err(|error| vec![ConfigError { line: 0, text: error.to_string() }])?;
    let located = Located::parse(text);
    let mut problems = Vec::new();
    let mut report = |path: String, reason: String| {
        let line = located.as_ref().map_or(0, |located| located.line_of(&path));
        problems.push(ConfigError { line, text: format!("{path}: {reason}") });
    };
    let mut desired: Vec<DesiredRedirects> = Vec::new();
    for (index, raw) in raw.redirects.into_iter().enumerate() {
        let path = format!("redirects[{index}]");
        let mut ranges = |field: &str, texts: &[String]| -> Vec<Cidr> {
            let parsed = texts.iter().enumerate().filter_map(|(index, text)| {
                let parsed = Cidr::parse(text);
                parsed
                    .map_err(|error| report(format!("{path}.{field}[{index}]"), error.to_string()))
                    .ok()
            });
            parsed.collect()
        };
        let redirect = RedirectConfig {
            owner: raw.owner.unwrap_or_else(|| "weft".to_owned()),
            inbound: raw.inbound,
            outbound: raw.outbound,
            forwarded: raw.forwarded,
            udp: raw.udp,
            services: ranges("services", &raw.services),
            dns: raw.dns,
            resolvers: raw.resolvers,
            exclude_inbound_ports: raw.exclude_inbound_ports,
            exclude_outbound_ports: raw.exclude_outbound_ports,
            exclude_destinations: ranges("exclude_destinations", &raw.exclude_destinations),
            exclude_interfaces: raw.exclude_interfaces,
            exclude_users: raw.exclude_users,
            strict: raw.strict,
            keep_source: raw.keep_source,
            mark: Mark::DEFAULT.0,
            uid: raw.uid,
        };
        if let Err(reason) = redirect.check() {
            report(path.clone(), reason);
        }
        let namespace = raw.netns.map_or(Namespace::Own, Namespace::At);
        if desired.iter().any(|one| one.namespace == namespace) {
            report(format!("{path}.netns"), format!("duplicate: {namespace} is listed twice"));
        }
        desired.push(DesiredRedirects { namespace, redirect, backend: raw.backend.into() });
    }
    if problems.is_empty() { Ok(desired) } else { Err(problems) }
}

/// Maintains the redirects of a file and reloads it when it changes. An invalid change leaves the redirects in force.
///
/// # Errors
/// The file has errors, or the guard cannot be started.
pub fn guard(file: &Path) -> Result<RedirectGuard, String> {
    let read = |file: &Path| std::fs::read_to_string(file).map_err(|error| error.to_string());
    let mut seen = read(file);
    let guard =
        RedirectGuard::start(parse_file(file, &seen)?).map_err(|error| error.to_string())?;
    let following = guard.clone();
    let file = file.to_owned();
    let follow = move || {
        loop {
            pause();
            let now = read(&file);
            if now == seen {
                continue;
            }
            match parse_file(&file, &now) {
                Ok(desired) => {
                    tracing::info!(file = %file.display(), redirects = desired.len(), "redirects changed");
                    following.update(desired);
                }
                Err(problems) => {
                    tracing::error!(problems, "invalid redirects file, the redirects in force stay")
                }
            }
            seen = now;
        }
    };
    std::thread::Builder::new()
        .name("redirect-file".into())
        .spawn(follow)
        .map_err(|error| error.to_string())?;
    Ok(guard)
}

/// Removes all rules of weft from a namespace, by any backend: the redirects, and the services of an agent's kernel
/// path. Removing what does not exist is not an error.
///
/// # Errors
/// The operation that failed.
pub fn remove_all(namespace: &Namespace) -> Result<(), RedirectError> {
    redirect::remove(namespace)?;
    kernel::remove_services(namespace)
}

/// Parses the file content, and adds the file name to errors.
fn parse_file(file: &Path, read: &Result<String, String>) -> Result<Vec<DesiredRedirects>, String> {
    let shown = file.display();
    let text = read.as_ref().map_err(|error| format!("{shown}: {error}"))?;
    parse(text).map_err(|problems| {
        let lines: Vec<String> = problems.iter().map(|p| format!("{shown}: {p}")).collect();
        lines.join("\n")
    })
}

#[expect(clippy::disallowed_methods, reason = "the step between two looks at a file")]
fn pause() {
    std::thread::sleep(POLL);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn example_file_with_every_setting_is_valid() {
        let desired = parse(include_str!("../examples/redirects.yaml")).expect("it is good");
        assert_eq!(desired.len(), 2);
        let workload = &desired.first().expect("there are two").redirect;
        assert!(workload.strict && !workload.exclude_users.is_empty());
    }

    #[test]
    fn file_is_parsed_into_redirects_per_namespace() {
        let text = "redirects:\n- {netns: /run/netns/web, inbound: 15006, backend: nft}\n\
            - {forwarded: 15001, services: [10.96.0.0/16]}\n";
        let desired = parse(text).expect("it is good");
        let places: Vec<String> = desired.iter().map(|one| one.namespace.to_string()).collect();
        assert_eq!(places, ["/run/netns/web", "this namespace"]);
        let first = desired.first().expect("there are two");
        assert_eq!(first.backend, BackendChoice::Only(RedirectBackend::Nft));
        assert_eq!(first.redirect.inbound, Some(15006));
    }

    #[test]
    fn every_error_has_its_line_and_field() {
        let text = "redirects:\n- inbound: 15006\n  services: [10.96.0.0/16, nonsense]\n\
            - netns: /a\n- netns: /b\n  udp: 1\n- inbound: 1\n";
        let problems = parse(text).expect_err("the file has errors");
        let errors: Vec<String> = problems.iter().map(ToString::to_string).collect();
        for (index, part) in [
            "line 3: redirects[0].services[1]: ",
            "line 4: redirects[1]: nothing to redirect",
            "line 5: redirects[2]: udp and forwarded need services",
            "line 7: redirects[3].netns: duplicate: this namespace is listed twice",
        ]
        .into_iter()
        .enumerate()
        {
            assert!(
                errors.get(index).is_some_and(|line| line.starts_with(part)),
                "{part}: {errors:#?}"
            );
        }
        let unknown = parse("redirects:\n- {inbund: 1}\n").expect_err("the field is unknown");
        assert!(unknown.first().is_some_and(|p| p.text.contains("inbund")), "{unknown:?}");
    }
}
