//! `weft why`.

mod decision;
mod request;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use weft_control::mesh::{Mesh, identity};
use weft_model::{MethodRefusal, Redirect, SpiffeId, is_header_name, method_refusal};

use super::{CommandError, print_line};
use decision::{
    Callee, Destination, PolicyDecision, PolicyOutcome, RouteDecision, RuleLocation, decide,
    port_of,
};
use request::WhyRequest;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft why -c mesh.yaml web orders:80 GET /orders/7\n  \
    weft why -c mesh.yaml spiffe://mesh.local/ns/default/sa/me database:5432\n  \
    weft why -c mesh.yaml web orders:80 GET /admin --token login --claim role=admin\n\n\
    Evaluates the routes of the mesh like the caller's sidecar and prints the matching rule, then evaluates the policies \
    of each destination for the path that arrives there, with the code that sidecars run.\n\n\
    Exit codes: 0 allowed or redirected, 1 denied at a destination, 2 usage or configuration error.")]
pub(super) struct WhyArgs {
    /// Mesh configuration, YAML
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    config: PathBuf,
    /// Caller: a service, or the SPIFFE ID of a workload with a sidecar
    caller: String,
    /// Called service and port, SERVICE:PORT
    callee: String,
    /// HTTP method [default: GET]
    #[arg(default_value = "GET", hide_default_value = true, value_parser = method)]
    method: String,
    /// Path with query, such as /orders?id=7 [default: /]
    #[arg(default_value = "/", hide_default_value = true, value_parser = target)]
    path: String,
    /// IP address of the caller; required when a policy uses from_addresses
    #[arg(long, value_name = "ADDRESS")]
    address: Option<IpAddr>,
    /// Issuer of the caller's token, by its name in mesh.yaml
    #[arg(long, value_name = "ISSUER")]
    token: Option<String>,
    /// Claim of the token; can be repeated
    #[arg(long, value_name = "NAME=VALUE", requires = "token", value_parser = pair)]
    claim: Vec<(String, String)>,
    /// Header of the request; can be repeated [default for host: SERVICE:PORT]
    #[arg(long, value_name = "NAME=VALUE", value_parser = header)]
    header: Vec<(String, String)>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("must be of the form NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = pair(text)?;
    if is_header_name(&name) {
        Ok((name, value))
    } else {
        Err(format!("invalid header name {name:?}: must be a name, such as x-version"))
    }
}

fn method(text: &str) -> Result<String, String> {
    // A method is a token (RFC 9110, section 9.1), as the name of a header is.
    if !is_header_name(text) {
        return Err("must be a method name, such as GET".into());
    }
    match method_refusal(text) {
        Some(MethodRefusal::NotUpperCase) => Err(format!(
            "methods are case-sensitive and sidecars answer 400: must be {:?}",
            text.to_ascii_uppercase()
        )),
        Some(MethodRefusal::Trace) => Err("sidecars answer TRACE with 405".into()),
        // The control plane does not enable CONNECT on any listener.
        None if text == "CONNECT" => Err("sidecars of the mesh answer CONNECT with 405".into()),
        None => Ok(text.to_owned()),
    }
}

fn target(text: &str) -> Result<String, String> {
    let is_clean = !text.contains(|c: char| c.is_whitespace() || c.is_control() || c == '#');
    if text == "*" || (text.starts_with('/') && is_clean) {
        Ok(text.to_owned())
    } else {
        Err("must start with / and contain no whitespace and no #, such as /orders?id=7".into())
    }
}

pub(super) fn run(arguments: &WhyArgs) -> Result<(), CommandError> {
    let mesh = mesh(&arguments.config)?;
    let caller = caller(&mesh, &arguments.caller)?;
    let callee = callee(&mesh, &arguments.callee)?;
    if arguments.path == "*" && arguments.method != "OPTIONS" {
        let reason = "invalid path \"*\": must start with /; * is for method OPTIONS";
        return Err(CommandError::Usage(reason.into()));
    }
    let token = arguments.token.as_deref().map(|name| {
        let issuer = mesh.issuers.get(name);
        issuer.map(|issuer| (name, issuer.issuer.as_str())).ok_or_else(|| {
            CommandError::Usage(format!(
                "unknown issuer {name:?}: must be a name in security.issuers"
            ))
        })
    });
    let host = arguments.header.iter().find(|(name, _)| name.eq_ignore_ascii_case("host"));
    let request = WhyRequest {
        caller,
        method: &arguments.method,
        target: &arguments.path,
        authority: host.map_or(&arguments.callee, |(_, value)| value),
        headers: &arguments.header,
        address: arguments.address,
        token: token.transpose()?,
        claims: &arguments.claim,
    };
    let from = mesh.services.get(&arguments.caller);
    match decide(&mesh, from, callee, &request) {
        RouteDecision::Direct { has_routes, outcome } => {
            if has_routes {
                let callee = &arguments.callee;
                print_line(&format!(
                    "route: no rule matches; the request is sent to {callee} unchanged"
                ));
            }
            report_outcome(&mesh, &callee.service.name, &outcome)
        }
        RouteDecision::Routed { rule, destinations } => {
            print_line(&format!("route: {}", rule_text(&rule)));
            report_destinations(&mesh, &request, &destinations)
        }
        RouteDecision::Redirected { rule, redirect } => {
            print_line(&format!("route: {}", rule_text(&rule)));
            print_line(&redirected(redirect));
            Ok(())
        }
    }
}

/// Prints the decision of each destination.
fn report_destinations(
    mesh: &Mesh,
    request: &WhyRequest<'_>,
    destinations: &[Destination<'_>],
) -> Result<(), CommandError> {
    let total: u64 = destinations.iter().map(|one| u64::from(one.weight)).sum();
    let mut failures = Vec::new();
    for destination in destinations {
        let Destination { service, port, weight, rewritten, outcome } = destination;
        let share = match destinations {
            [_] => String::new(),
            _ => format!(", weight {weight} of {total}"),
        };
        let path = match rewritten {
            Some(after) => format!("path {:?} rewritten to {after:?}", request.target),
            None => format!("path {:?} unchanged", request.target),
        };
        print_line(&format!("destination: {service}:{port}{share}, {path}"));
        match report_outcome(mesh, service, outcome) {
            Ok(()) => {}
            Err(CommandError::Failed(text)) if destinations.len() > 1 => {
                print_line(&text);
                failures.push(format!("{service}:{port}"));
            }
            Err(failure) => return Err(failure),
        }
    }
    if failures.is_empty() {
        return Ok(());
    }
    let count = failures.len();
    let all = destinations.len();
    Err(CommandError::Failed(format!(
        "denied at {count} of {all} destinations: {}",
        failures.join(", ")
    )))
}

/// Prints why a request is allowed.
///
/// # Errors
/// The policies deny the request, or need more options to decide.
fn report_outcome(mesh: &Mesh, service: &str, outcome: &PolicyOutcome) -> Result<(), CommandError> {
    match outcome {
        PolicyOutcome::NotEnforced(reason) => print_line(&format!("allowed: {reason}")),
        PolicyOutcome::NoIdentity(reason) => {
            return Err(CommandError::Failed(format!("denied: {reason}")));
        }
        PolicyOutcome::NeedsAddress(clause) => {
            let clause = clause_location(mesh, clause);
            let reason = format!("missing --address: {clause} uses from_addresses");
            return Err(CommandError::Usage(reason));
        }
        PolicyOutcome::NeedsToken(issuers) => {
            let reason = format!("no token of issuer {issuers}; send one with --token");
            return Err(CommandError::Failed(format!("denied: {reason}")));
        }
        PolicyOutcome::Evaluated(PolicyDecision { is_refused, clause, shadow }) => {
            let because = |clause: Option<&str>| match clause {
                Some(clause) => clause_location(mesh, clause),
                None => format!("no policy of {service} allows the request"),
            };
            if let Some(shadow) = shadow {
                let because = because(shadow.as_deref());
                print_line(&format!("dry_run policy would deny the request: {because}"));
            }
            let because = because(clause.as_deref());
            if *is_refused {
                return Err(CommandError::Failed(format!("denied: {because}")));
            }
            print_line(&format!("allowed: {because}"));
        }
    }
    Ok(())
}

/// The field path of a clause, and its name in access logs.
fn clause_location(mesh: &Mesh, clause: &str) -> String {
    match mesh.field_path_of(clause) {
        Some(place) => format!("{place} ({clause} in access logs)"),
        None => clause.to_owned(),
    }
}

fn rule_text(rule: &RuleLocation<'_>) -> String {
    format!("{} of route {:?}", rule.path, rule.route)
}

fn redirected(redirect: &Redirect) -> String {
    let Redirect { status, scheme, host, path, .. } = redirect;
    let parts = [("scheme", scheme), ("host", host), ("path", path)];
    let changed = parts.iter().filter_map(|(name, value)| Some((name, value.as_ref()?)));
    let changed: Vec<String> = changed.map(|(name, value)| format!("{name} {value:?}")).collect();
    let target =
        if changed.is_empty() { "an unchanged location".into() } else { changed.join(", ") };
    format!(
        "redirected: {status} to {target}; the request reaches no service and no policy is evaluated"
    )
}

fn mesh(file: &Path) -> Result<Mesh, CommandError> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| CommandError::Usage(format!("{}: {error}", file.display())))?;
    let folder = file.parent().unwrap_or_else(|| Path::new("."));
    Mesh::parse(&text, folder).map_err(|problems| {
        let name = file.display().to_string();
        let lines: Vec<String> = problems.iter().map(|p| p.in_file(name.clone())).collect();
        CommandError::Usage(lines.join("\n"))
    })
}

fn caller(mesh: &Mesh, text: &str) -> Result<SpiffeId, CommandError> {
    if text.starts_with("spiffe://") {
        return SpiffeId::parse(text).map_err(|error| CommandError::Usage(error.to_string()));
    }
    if mesh.services.contains_key(text) {
        return identity(&mesh.trust_domain, text).map_err(|e| CommandError::Usage(e.to_string()));
    }
    Err(unknown(mesh, text, "a service or a SPIFFE ID"))
}

fn callee<'m>(mesh: &'m Mesh, text: &str) -> Result<Callee<'m>, CommandError> {
    let parts = text.rsplit_once(':').and_then(|(name, port)| Some((name, port.parse().ok()?)));
    let Some((name, number)) = parts else {
        return Err(CommandError::Usage(format!(
            "invalid destination {text:?}: must be SERVICE:PORT"
        )));
    };
    let service = mesh.services.get(name).ok_or_else(|| unknown(mesh, name, "a service"))?;
    let port = port_of(service, number).ok_or_else(|| {
        let ports: Vec<String> = service.ports.iter().map(|port| port.port.to_string()).collect();
        CommandError::Usage(format!(
            "service {name} has no port {number}: must be one of {}",
            ports.join(", ")
        ))
    })?;
    Ok(Callee { service, port })
}

fn unknown(mesh: &Mesh, text: &str, what: &str) -> CommandError {
    let known: Vec<&str> = mesh.services.keys().map(String::as_str).collect();
    CommandError::Usage(format!(
        "{text:?} is not {what} of the mesh: services are {}",
        known.join(", ")
    ))
}
