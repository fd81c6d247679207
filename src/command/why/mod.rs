//! `weft why`.

mod decision;
mod request;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use weft_control::mesh::{Mesh, Port, Service, identity};
use weft_model::{MethodRefusal, Redirect, SpiffeId, is_header_name, method_refusal};

use super::{Failure, say};
use decision::{Decision, Destination, Judged, Outcome, RulePlace, decide, port_of};
use request::Request;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft why -c mesh.yaml web orders:80 GET /orders/7\n  \
    weft why -c mesh.yaml spiffe://mesh.local/ns/default/sa/me database:5432\n  \
    weft why -c mesh.yaml web orders:80 GET /admin --token login --claim role=admin\n\n\
    The routes of the mesh are followed as the caller's sidecar does: the command prints the rule that matches, \
    and evaluates the policies of each destination for the path that arrives there. Routes are matched and policies \
    evaluated by the functions that sidecars use. Exit codes: 0 allowed or redirected, 1 refused at a destination, \
    2 usage or configuration error.")]
pub(super) struct Arguments {
    /// The mesh.
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    config: PathBuf,
    /// The caller: a service, or a SPIFFE id, which is taken for that of a workload with a sidecar.
    caller: String,
    /// The service and port that are called: SERVICE:PORT.
    callee: String,
    /// The method; GET when left out.
    #[arg(default_value = "GET", hide_default_value = true, value_parser = method)]
    method: String,
    /// The path with its query, such as /orders?id=7; / when left out.
    #[arg(default_value = "/", hide_default_value = true, value_parser = target)]
    path: String,
    /// The caller's address; required where a policy decides by from_addresses.
    #[arg(long, value_name = "ADDRESS")]
    address: Option<IpAddr>,
    /// The issuer of the token that the caller sends, by its name in mesh.yaml.
    #[arg(long, value_name = "ISSUER")]
    token: Option<String>,
    /// A claim of the token.
    #[arg(long, value_name = "NAME=VALUE", requires = "token", value_parser = pair)]
    claim: Vec<(String, String)>,
    /// A header of the request; host is SERVICE:PORT unless given.
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
        // The control plane enables CONNECT on no listener.
        None if text == "CONNECT" => Err("sidecars of the mesh answer CONNECT with 405".into()),
        None => Ok(text.to_owned()),
    }
}

fn target(text: &str) -> Result<String, String> {
    let is_clean = !text.contains(|c: char| c.is_whitespace() || c.is_control() || c == '#');
    if text == "*" || (text.starts_with('/') && is_clean) {
        Ok(text.to_owned())
    } else {
        Err("must start with / and have no blanks and no #, such as /orders?id=7".into())
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mesh = mesh(&arguments.config)?;
    let caller = caller(&mesh, &arguments.caller)?;
    let callee = callee(&mesh, &arguments.callee)?;
    if arguments.path == "*" && arguments.method != "OPTIONS" {
        let reason = "invalid path \"*\": must start with /; * is for method OPTIONS";
        return Err(Failure::Usage(reason.into()));
    }
    let token = arguments.token.as_deref().map(|name| {
        let issuer = mesh.issuers.get(name);
        issuer.map(|issuer| (name, issuer.issuer.as_str())).ok_or_else(|| {
            Failure::Usage(format!("there is no issuer {name:?} in security.issuers"))
        })
    });
    let host = arguments.header.iter().find(|(name, _)| name.eq_ignore_ascii_case("host"));
    let request = Request {
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
        Decision::Direct { has_routes, outcome } => {
            if has_routes {
                let callee = &arguments.callee;
                say(&format!("route: no rule matches; the request is sent to {callee} unchanged"));
            }
            answer(&mesh, &callee.0.name, &outcome)
        }
        Decision::Routed { rule, destinations } => {
            say(&format!("route: {}", words(&rule)));
            destinations_of(&mesh, &request, &destinations)
        }
        Decision::Redirected { rule, redirect } => {
            say(&format!("route: {}", words(&rule)));
            say(&redirected(redirect));
            Ok(())
        }
    }
}

/// Prints what each destination decides.
fn destinations_of(
    mesh: &Mesh,
    request: &Request<'_>,
    destinations: &[Destination<'_>],
) -> Result<(), Failure> {
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
        say(&format!("destination: {service}:{port}{share}, {path}"));
        match answer(mesh, service, outcome) {
            Ok(()) => {}
            Err(Failure::Failed(text)) if destinations.len() > 1 => {
                say(&text);
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
    Err(Failure::Failed(format!(
        "refused at {count} of {all} destinations: {}",
        failures.join(", ")
    )))
}

/// Prints what is allowed. What is refused is the failure.
fn answer(mesh: &Mesh, service: &str, outcome: &Outcome) -> Result<(), Failure> {
    match outcome {
        Outcome::NotEnforced(reason) => say(&format!("allowed: {reason}")),
        Outcome::NoIdentity(reason) => return Err(Failure::Failed(format!("refused: {reason}"))),
        Outcome::NeedsAddress(clause) => {
            let clause = place(mesh, clause);
            let reason = format!("--address is missing: {clause} decides by from_addresses");
            return Err(Failure::Usage(reason));
        }
        Outcome::NeedsToken(issuers) => {
            let reason = format!("it needs a token of {issuers}; set --token to send one");
            return Err(Failure::Failed(format!("refused: {reason}")));
        }
        Outcome::Judged(Judged { is_refused, clause, shadow }) => {
            let because = |clause: Option<&str>| match clause {
                Some(clause) => place(mesh, clause),
                None => format!("no policy of {service} allows it"),
            };
            if let Some(shadow) = shadow {
                let because = because(shadow.as_deref());
                say(&format!("a policy with dry_run would refuse the request: {because}"));
            }
            let because = because(clause.as_deref());
            if *is_refused {
                return Err(Failure::Failed(format!("refused: {because}")));
            }
            say(&format!("allowed: {because}"));
        }
    }
    Ok(())
}

/// Where a clause is in the file, and its name in access logs.
fn place(mesh: &Mesh, clause: &str) -> String {
    match mesh.place_of(clause) {
        Some(place) => format!("{place} ({clause} in access logs)"),
        None => clause.to_owned(),
    }
}

fn words(rule: &RulePlace<'_>) -> String {
    format!("{} of route {:?}", rule.path, rule.route)
}

fn redirected(redirect: &Redirect) -> String {
    let Redirect { status, scheme, host, path, .. } = redirect;
    let parts = [("scheme", scheme), ("host", host), ("path", path)];
    let changed = parts.iter().filter_map(|(name, value)| Some((name, value.as_ref()?)));
    let changed: Vec<String> = changed.map(|(name, value)| format!("{name} {value:?}")).collect();
    let target =
        if changed.is_empty() { "an unchanged location".into() } else { changed.join(", ") };
    format!("redirected: {status} to {target}; no service gets the request, no policy is evaluated")
}

fn mesh(file: &Path) -> Result<Mesh, Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| Failure::Usage(format!("{}: {error}", file.display())))?;
    let folder = file.parent().unwrap_or_else(|| Path::new("."));
    Mesh::parse(&text, folder).map_err(|problems| {
        let name = file.display().to_string();
        let lines: Vec<String> = problems.iter().map(|p| p.in_file(name.clone())).collect();
        Failure::Usage(lines.join("\n"))
    })
}

fn caller(mesh: &Mesh, text: &str) -> Result<SpiffeId, Failure> {
    if text.starts_with("spiffe://") {
        return SpiffeId::parse(text).map_err(|error| Failure::Usage(error.to_string()));
    }
    if mesh.services.contains_key(text) {
        return identity(&mesh.trust_domain, text).map_err(|e| Failure::Usage(e.to_string()));
    }
    Err(unknown(mesh, text, "a service or a SPIFFE id"))
}

fn callee<'m>(mesh: &'m Mesh, text: &str) -> Result<(&'m Service, &'m Port), Failure> {
    let parts = text.rsplit_once(':').and_then(|(name, port)| Some((name, port.parse().ok()?)));
    let Some((name, number)) = parts else {
        return Err(Failure::Usage(format!("{text:?} is not of the form SERVICE:PORT")));
    };
    let service = mesh.services.get(name).ok_or_else(|| unknown(mesh, name, "a service"))?;
    let port = port_of(service, number).ok_or_else(|| {
        let ports: Vec<String> = service.ports.iter().map(|port| port.port.to_string()).collect();
        Failure::Usage(format!("{name} has no port {number}; it has {}", ports.join(", ")))
    })?;
    Ok((service, port))
}

fn unknown(mesh: &Mesh, text: &str, what: &str) -> Failure {
    let known: Vec<&str> = mesh.services.keys().map(String::as_str).collect();
    Failure::Usage(format!("{text:?} is not {what} of the mesh; services are {}", known.join(", ")))
}
