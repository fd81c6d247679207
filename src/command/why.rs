//! `weft why`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use clap::Args;
use weft_control::mesh::{Mesh, Port, Protocol, Service, identity};
use weft_control::resources::checks;
use weft_model::path::{Reading, Readings};
use weft_model::{
    HttpFilter, JwtPolicy, JwtRequirement, RbacFilter, RequestFacts, SpiffeId, Verdict,
    judge_readings, query_parameter,
};

use super::{Failure, say};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft why -c mesh.yaml web orders:80 GET /orders/7\n  \
    weft why -c mesh.yaml spiffe://mesh.local/ns/default/sa/me database:5432\n  \
    weft why -c mesh.yaml web orders:80 GET /admin --token login --claim role=admin\n\n\
    The answer is given by the function that decides in the sidecar. Exit codes: 0 it is allowed, 1 it is \
    refused, 2 what was asked is wrong.")]
pub(super) struct Arguments {
    /// The mesh.
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    config: PathBuf,
    /// Who calls: a service, or a SPIFFE id.
    caller: String,
    /// What is called: SERVICE:PORT.
    callee: String,
    /// The method; GET when left out.
    method: Option<String>,
    /// The path, with its query if there is one; / when left out.
    path: Option<String>,
    /// The caller's address; needed where a policy decides by from_addresses.
    #[arg(long, value_name = "ADDRESS")]
    address: Option<IpAddr>,
    /// The issuer of the token that the caller shows, as mesh.yaml names it.
    #[arg(long, value_name = "ISSUER")]
    token: Option<String>,
    /// What the token claims.
    #[arg(long, value_name = "NAME=VALUE", requires = "token", value_parser = claim)]
    claim: Vec<(String, String)>,
    /// A field of the request.
    #[arg(long, value_name = "NAME=VALUE", value_parser = claim)]
    header: Vec<(String, String)>,
}

fn claim(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it is not of the form NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let text = std::fs::read_to_string(&arguments.config)
        .map_err(|error| Failure::Usage(format!("{}: {error}", arguments.config.display())))?;
    let folder = arguments.config.parent().unwrap_or_else(|| Path::new("."));
    let mesh = Mesh::parse(&text, folder).map_err(|problems| {
        let file = arguments.config.display();
        let lines: Vec<String> = problems.iter().map(|p| p.in_file(file.to_string())).collect();
        Failure::Usage(lines.join("\n"))
    })?;
    let caller = caller(&mesh, &arguments.caller)?;
    let (service, port) = callee(&mesh, &arguments.callee)?;
    if !service.meshed {
        let name = &service.name;
        say(&format!("allowed: service {name:?} is outside the mesh; no policy is enforced"));
        return Ok(());
    }
    if port.protocol == Protocol::Udp {
        say("allowed: udp passes no sidecar; no policy is enforced");
        return Ok(());
    }
    if mesh.services.get(&arguments.caller).is_some_and(|caller| !caller.meshed) {
        let reason = "it has meshed: false, so it has no certificate, and the handshake fails";
        return Err(Failure::Failed(format!(
            "refused: service {:?} has no identity: {reason}",
            arguments.caller
        )));
    }
    needs_address(&mesh, service, port, arguments)?;
    let token = arguments.token.as_deref().map(|name| {
        let issuer = mesh.issuers.get(name);
        issuer.map(|issuer| (name, issuer.issuer.as_str())).ok_or_else(|| {
            Failure::Usage(format!("there is no issuer {name:?} in security.issuers"))
        })
    });
    let question = Question { arguments, caller, port, token: token.transpose()?, reading: None };
    let checks = checks(&mesh, service, port);
    let path = question.target().split('?').next().unwrap_or_default();
    let readings = Readings::of(path);
    let count = readings.as_ref().map_or(1, |readings| readings.iter().count());
    let each = || {
        (0..count).map(|index| {
            let reading = readings.as_ref().and_then(|readings| readings.get(index));
            Question { reading, ..question.clone() }
        })
    };
    if let Some(issuers) = each().find_map(|question| missing_token(&checks, &question)) {
        let reason = format!("it needs a token of {issuers}; --token says that it shows one");
        return Err(Failure::Failed(format!("refused: {reason}")));
    }
    let rules: Vec<&RbacFilter> = checks
        .iter()
        .filter_map(|check| match check {
            HttpFilter::Rbac(rules) => Some(&**rules),
            HttpFilter::Jwt(_) => None,
        })
        .collect();
    let judgement = judge_readings(&rules.into_iter(), each());
    if let Some(shadow) = judgement.shadow.filter(|shadow| shadow.refused) {
        say(&format!(
            "a policy that only watches would refuse it: {}",
            because(shadow, &mesh, service)
        ));
    }
    let because = because(judgement.verdict, &mesh, service);
    if judgement.verdict.refused {
        return Err(Failure::Failed(format!("refused: {because}")));
    }
    say(&format!("allowed: {because}"));
    Ok(())
}

fn because(verdict: Verdict<'_>, mesh: &Mesh, service: &Service) -> String {
    match verdict.by {
        Some(rule) => place(mesh, rule),
        None => format!("no policy of {} allows it", service.name),
    }
}

/// Where a clause is in the file, and its name in access logs.
fn place(mesh: &Mesh, clause: &str) -> String {
    match mesh.place_of(clause) {
        Some(place) => format!("{place} ({clause} in access logs)"),
        None => clause.to_owned(),
    }
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
    let ports: Vec<String> = service.ports.iter().map(|port| port.port.to_string()).collect();
    let number: u16 = number;
    // A number may be of two ports; policies are enforced on the one that is not udp.
    let mut known: Vec<&Port> = service.ports.iter().filter(|port| port.port == number).collect();
    known.sort_by_key(|port| port.protocol == Protocol::Udp);
    let port = known.first().copied().ok_or_else(|| {
        Failure::Usage(format!("{name} has no port {number}; it has {}", ports.join(", ")))
    })?;
    Ok((service, port))
}

/// Refuses a question without an address where a clause of the port decides by the caller's.
fn needs_address(
    mesh: &Mesh,
    service: &Service,
    port: &Port,
    arguments: &Arguments,
) -> Result<(), Failure> {
    if arguments.address.is_some() {
        return Ok(());
    }
    let policies = mesh.policies.iter().filter(|policy| policy.service == service.name);
    let mut clauses = policies.flat_map(|policy| policy.allow.iter().chain(&policy.deny));
    let deciding = clauses.find(|clause| clause.is_of(port) && !clause.from_addresses.is_empty());
    match deciding {
        None => Ok(()),
        Some(clause) => Err(Failure::Usage(format!(
            "--address is missing: {} decides by from_addresses",
            place(mesh, &clause.name)
        ))),
    }
}

fn unknown(mesh: &Mesh, text: &str, what: &str) -> Failure {
    let known: Vec<&str> = mesh.services.keys().map(String::as_str).collect();
    Failure::Usage(format!("{text:?} is not {what} of the mesh; services are {}", known.join(", ")))
}

/// The issuers of whom a token is asked for, when none of them is shown.
fn missing_token(checks: &[HttpFilter], question: &Question<'_>) -> Option<String> {
    let policy: &JwtPolicy = checks.iter().find_map(|check| match check {
        HttpFilter::Jwt(policy) => Some(&**policy),
        HttpFilter::Rbac(_) => None,
    })?;
    let rule = policy.rules.get(policy.rule(question)?)?;
    let requirement = rule.requires.as_ref()?;
    let is_met = meets(requirement, question.token.map(|(shown, _)| shown));
    (!is_met).then(|| names(requirement).join(" or "))
}

/// Whether a token of that issuer, or none, is what a request needs.
fn meets(requirement: &JwtRequirement, shown: Option<&str>) -> bool {
    match requirement {
        JwtRequirement::Provider(name, _) => shown == Some(&**name),
        JwtRequirement::Any(all) => all.iter().any(|one| meets(one, shown)),
        JwtRequirement::All(all) => all.iter().all(|one| meets(one, shown)),
        JwtRequirement::Missing => shown.is_none(),
    }
}

/// The issuers that a requirement names.
fn names(requirement: &JwtRequirement) -> Vec<&str> {
    match requirement {
        JwtRequirement::Provider(name, _) => vec![&**name],
        JwtRequirement::Any(all) | JwtRequirement::All(all) => all.iter().flat_map(names).collect(),
        JwtRequirement::Missing => Vec::new(),
    }
}

/// What is asked, in the form of a request.
#[derive(Clone)]
struct Question<'a> {
    arguments: &'a Arguments,
    caller: SpiffeId,
    port: &'a Port,
    /// The name of the issuer, and the issuer.
    token: Option<(&'a str, &'a str)>,
    /// How a service reads the path, where there are several ways.
    reading: Option<&'a Reading>,
}

impl Question<'_> {
    fn target(&self) -> &str {
        self.arguments.path.as_deref().unwrap_or("/")
    }
}

impl RequestFacts for Question<'_> {
    fn method(&self) -> &str {
        self.arguments.method.as_deref().unwrap_or("GET")
    }

    fn path(&self) -> &str {
        let as_sent = || self.target().split('?').next().unwrap_or_default();
        self.reading.map_or_else(as_sent, Reading::path)
    }

    fn path_fits(&self, fits: &mut dyn FnMut(&str) -> bool) -> bool {
        match self.reading {
            Some(reading) => reading.fits(fits),
            None => fits(self.path()),
        }
    }

    fn target_fits(&self, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        match self.reading {
            Some(reading) => {
                let query = self.target().find('?').and_then(|at| self.target().get(at..));
                let query = query.unwrap_or_default();
                reading.fits(&mut |path| fits(format!("{path}{query}").as_bytes()))
            }
            None => fits(self.target().as_bytes()),
        }
    }

    fn scheme(&self) -> &'static str {
        "http"
    }

    fn authority(&self) -> &str {
        self.arguments.callee.as_str()
    }

    fn has_header(&self, name: &str, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        let mut all = self.arguments.header.iter();
        all.any(|(known, value)| known.eq_ignore_ascii_case(name) && fits(value.as_bytes()))
    }

    fn query(&self, name: &str) -> Option<&str> {
        query_parameter(self.target(), name)
    }

    fn has_claim(&self, name: &str, way: &[String], fits: &mut dyn FnMut(&str) -> bool) -> bool {
        match (self.token, way) {
            (Some((shown, issuer)), [claim]) if shown == name => {
                let mut all = self.arguments.claim.iter();
                (claim == "iss" && fits(issuer))
                    || all.any(|(known, value)| known == claim && fits(value))
            }
            _ => false,
        }
    }

    fn peer(&self) -> Option<&SpiffeId> {
        Some(&self.caller)
    }

    /// Where no address is given, no clause asks for one.
    fn remote_address(&self) -> IpAddr {
        self.arguments.address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
    }

    fn client_address(&self) -> IpAddr {
        self.remote_address()
    }

    /// No policy of `mesh.yaml` asks for it.
    fn destination_address(&self) -> IpAddr {
        Ipv4Addr::UNSPECIFIED.into()
    }

    fn destination_port(&self) -> u16 {
        self.port.target
    }
}
