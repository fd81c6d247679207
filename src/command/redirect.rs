//! `weft redirect`.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use weft_agent::redirect::{
    BackendChoice, Namespace, ProbeOutcome, RedirectBackend, RedirectConfig, RedirectError,
    RedirectState, apply_once, plan, probe, remove_all, verify,
};
use weft_model::Cidr;
use weft_runtime::drain::{Drain, Phase, drain_on_signals};
use weft_runtime::socket::Mark;

use super::{Failure, say};
use crate::redirects;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft redirect plan --inbound 15006 --outbound 15001 --services 10.96.0.0/16     what a sidecar needs\n  \
    weft redirect apply --forwarded 15001 --udp 15099 --services 10.96.0.0/16       what an agent needs\n  \
    weft redirect remove --netns /run/netns/web")]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the rules, install nothing.
    Plan(Wanted),
    /// Install the rules, replacing what was there.
    Apply(Wanted),
    /// Compare what is installed with what is wanted; exit code 1 when it differs.
    Verify(Wanted),
    /// Print what differs from what is wanted, a line each; exit code 1 when something does.
    Diff(Wanted),
    /// Make a connection as any program would, and see whether it is handed over; exit code 1 when it is
    /// not.
    Probe(Wanted),
    /// Keep the redirects of a file in force, in many network namespaces, until told to end. They stay.
    Guard {
        /// The file, YAML: `redirects: [{netns: /run/netns/web, inbound: 15006, outbound: 15001}]`. It is
        /// followed.
        file: PathBuf,
    },
    /// Remove every rule of weft.
    Remove(Place),
}

/// The ports that rules can name.
const PORT: std::ops::RangeInclusive<i64> = 1..=65_535;

#[derive(Debug, Args)]
struct Place {
    /// The network namespace, such as /run/netns/web or /proc/42/ns/net.
    #[arg(long, value_name = "FILE")]
    netns: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Wanted {
    #[command(flatten)]
    place: Place,
    /// What installs them: the kernel itself, or a tool.
    #[arg(long, value_enum, default_value_t = Tool::Auto)]
    backend: Tool,
    /// The port that takes TCP arriving for this host's addresses.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(PORT))]
    inbound: Option<u16>,
    /// The port that takes TCP leaving this host.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(PORT))]
    outbound: Option<u16>,
    /// The port that takes TCP for services arriving from other hosts.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(PORT))]
    forwarded: Option<u16>,
    /// The port that takes UDP for services.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(PORT))]
    udp: Option<u16>,
    /// The addresses of services; for --outbound, every address when not given.
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = cidr)]
    services: Vec<Cidr>,
    /// The port of loopback at which a DNS server takes what programs ask --resolvers. It must answer; a
    /// guard hands questions over as long as it does.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(PORT))]
    dns: Option<u16>,
    /// The resolvers whose questions are taken, such as 127.0.0.11.
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    resolvers: Vec<IpAddr>,
    /// Ports that arriving traffic keeps.
    #[arg(long, value_name = "PORT", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(PORT))]
    exclude_inbound_ports: Vec<u16>,
    /// Ports that leaving traffic keeps.
    #[arg(long, value_name = "PORT", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(PORT))]
    exclude_outbound_ports: Vec<u16>,
    /// Addresses that leaving traffic keeps.
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = cidr)]
    exclude_destinations: Vec<Cidr>,
    /// Network devices whose traffic stays as it is, both ways.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    exclude_interfaces: Vec<String>,
    /// Users whose leaving traffic stays as it is.
    #[arg(long, value_name = "UID", value_delimiter = ',')]
    exclude_users: Vec<u32>,
    /// Drop what would pass by the proxy: what arrives (with --inbound) or leaves (with --outbound) and
    /// is neither handed over nor excluded. Answers pass.
    #[arg(long)]
    strict: bool,
    /// Hand answers to the proxy where it sends from its clients' addresses.
    #[arg(long)]
    keep_source: bool,
    /// The user the proxy runs as, where it may not set a mark.
    #[arg(long, value_name = "UID")]
    uid: Option<u32>,
    /// Who installs it, in the table's comment.
    #[arg(long, default_value = "weft", value_name = "NAME")]
    owner: String,
}

/// What installs rules, as it is asked for.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Tool {
    /// The kernel's nf_tables; iptables where the kernel has none.
    Auto,
    /// The kernel's nf_tables, told by weft itself: no tool is needed.
    Native,
    /// The same, told by the command nft.
    Nft,
    /// iptables-restore and ip6tables-restore.
    Iptables,
}

impl Tool {
    /// The choice it stands for.
    pub(crate) fn choice(self) -> BackendChoice {
        match self {
            Self::Auto => BackendChoice::Auto,
            Self::Native => BackendChoice::Only(RedirectBackend::Native),
            Self::Nft => BackendChoice::Only(RedirectBackend::Nft),
            Self::Iptables => BackendChoice::Only(RedirectBackend::Iptables),
        }
    }
}

fn cidr(text: &str) -> Result<Cidr, String> {
    Cidr::parse(text).map_err(|error| error.to_string())
}

pub(super) fn run(arguments: Arguments, log: &str) -> Result<(), Failure> {
    match arguments.command {
        Command::Plan(wanted) => {
            // A plan can be printed where nothing of it can be done.
            let backend = match wanted.backend.choice() {
                BackendChoice::Only(backend) => backend,
                BackendChoice::Auto => {
                    BackendChoice::Auto.resolve().unwrap_or(RedirectBackend::Native)
                }
            };
            say(plan(&wanted.redirect(), backend).map_err(explain)?.trim_end());
            Ok(())
        }
        Command::Apply(wanted) => {
            let backend = wanted.backend.choice().resolve().map_err(explain)?;
            let redirect = wanted.redirect();
            apply_once(&redirect, backend, &wanted.place.namespace()).map_err(explain)?;
            say(&format!(
                "installed by {backend}: owner={} hash={}",
                redirect.owner,
                redirect.hash()
            ));
            Ok(())
        }
        Command::Verify(wanted) => {
            let backend = wanted.backend.choice().resolve().map_err(explain)?;
            match verify(&wanted.redirect(), backend, &wanted.place.namespace()).map_err(explain)? {
                RedirectState::InSync => {
                    say("as wanted");
                    Ok(())
                }
                RedirectState::NotInstalled => {
                    Err(Failure::Failed("nothing of weft is installed".into()))
                }
                RedirectState::Drifted(how) => {
                    Err(Failure::Failed(format!("what is installed differs:\n{}", how.join("\n"))))
                }
            }
        }
        Command::Diff(wanted) => {
            let backend = wanted.backend.choice().resolve().map_err(explain)?;
            match verify(&wanted.redirect(), backend, &wanted.place.namespace()).map_err(explain)? {
                RedirectState::InSync => return Ok(()),
                RedirectState::NotInstalled => say("nothing of weft is installed"),
                RedirectState::Drifted(how) => how.iter().for_each(|line| say(line)),
            }
            Err(Failure::Failed("what is installed is not what is wanted".into()))
        }
        Command::Probe(wanted) => {
            match probe(&wanted.redirect(), &wanted.place.namespace()).map_err(explain)? {
                passed @ ProbeOutcome::NotRedirected(..) => {
                    Err(Failure::Failed(passed.to_string()))
                }
                told => {
                    say(&told.to_string());
                    Ok(())
                }
            }
        }
        Command::Guard { file } => guard(&file, log),
        Command::Remove(place) => remove_all(&place.namespace()).map_err(explain),
    }
}

/// Guards until a signal says to end.
fn guard(file: &Path, log: &str) -> Result<(), Failure> {
    weft_runtime::log::start(log).map_err(Failure::Usage)?;
    let drain = Drain::new(Duration::ZERO);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::Failed(error.to_string()))?;
    let _guard = redirects::guard(file).map_err(Failure::Usage)?;
    runtime.block_on(async {
        drain_on_signals(&drain).map_err(|error| Failure::Failed(error.to_string()))?;
        drain.reached(Phase::Draining).await;
        Ok(())
    })
}

impl Wanted {
    fn redirect(&self) -> RedirectConfig {
        RedirectConfig {
            owner: self.owner.clone(),
            inbound: self.inbound,
            outbound: self.outbound,
            forwarded: self.forwarded,
            udp: self.udp,
            services: self.services.clone(),
            dns: self.dns,
            resolvers: self.resolvers.clone(),
            exclude_inbound_ports: self.exclude_inbound_ports.clone(),
            exclude_outbound_ports: self.exclude_outbound_ports.clone(),
            exclude_destinations: self.exclude_destinations.clone(),
            exclude_interfaces: self.exclude_interfaces.clone(),
            exclude_users: self.exclude_users.clone(),
            strict: self.strict,
            keep_source: self.keep_source,
            mark: Mark::DEFAULT.0,
            uid: self.uid,
        }
    }
}

impl Place {
    fn namespace(&self) -> Namespace {
        self.netns.clone().map_or(Namespace::Own, Namespace::At)
    }
}

#[allow(clippy::needless_pass_by_value, reason = "handed over by map_err")]
fn explain(error: RedirectError) -> Failure {
    match error {
        RedirectError::Invalid(text) => Failure::Usage(text),
        other => Failure::Failed(other.to_string()),
    }
}
