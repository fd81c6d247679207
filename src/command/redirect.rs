//! `weft redirect`.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use weft_agent::redirect::{
    BackendChoice, Namespace, ProbeOutcome, RedirectBackend, RedirectConfig, RedirectError,
    RedirectState, apply_once, plan, probe, verify,
};
use weft_model::Cidr;
use weft_runtime::drain::{Drain, Phase, drain_on_signals};
use weft_runtime::socket::Mark;

use super::{CommandError, print_line};
use crate::redirects;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft redirect plan --inbound 15006 --outbound 15001 --services 10.96.0.0/16     rules of a sidecar\n  \
    weft redirect apply --forwarded 15001 --udp 15099 --services 10.96.0.0/16       rules of an agent\n  \
    weft redirect remove --netns /run/netns/web")]
pub(super) struct RedirectArgs {
    #[command(subcommand)]
    command: RedirectCommand,
}

#[derive(Debug, Subcommand)]
enum RedirectCommand {
    /// Print the rules without installing them
    Plan(RuleArgs),
    /// Install the rules, replacing existing rules of weft
    Apply(RuleArgs),
    /// Check that the installed rules match the options; exit code 1 when they differ
    Verify(RuleArgs),
    /// Print the differences between the installed rules and the options; exit code 1 when there are any
    Diff(RuleArgs),
    /// Open a test connection and check that it is redirected; exit code 1 when it is not
    Probe(RuleArgs),
    /// Maintain the redirects of a file in several network namespaces until a shutdown signal; the rules stay installed
    Guard {
        /// YAML file: `redirects: [{netns: /run/netns/web, inbound: 15006, outbound: 15001}]`; reloaded when it changes
        file: PathBuf,
    },
    /// Remove all rules of weft
    Remove(NamespaceArgs),
}

/// The accepted port numbers.
const PORT: std::ops::RangeInclusive<i64> = 1..=65_535;

#[derive(Debug, Args)]
struct NamespaceArgs {
    /// Network namespace, such as /run/netns/web or /proc/42/ns/net [default: the current one]
    #[arg(long, value_name = "FILE")]
    netns: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct RuleArgs {
    #[command(flatten)]
    place: NamespaceArgs,
    /// Backend that installs the rules
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    backend: BackendArg,
    /// Capture port for inbound TCP to addresses of this host
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(PORT))]
    inbound: Option<u16>,
    /// Capture port for outbound TCP of this host
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(PORT))]
    outbound: Option<u16>,
    /// Capture port for forwarded TCP: from other hosts to --services
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(PORT))]
    forwarded: Option<u16>,
    /// Capture port for UDP to --services
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(PORT))]
    udp: Option<u16>,
    /// Addresses of services; without this option --outbound captures TCP to every address
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = cidr)]
    services: Vec<Cidr>,
    /// Loopback port of a DNS server that receives the queries to --resolvers. A guard redirects DNS only while the server
    /// answers
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(PORT))]
    dns: Option<u16>,
    /// Resolver addresses whose DNS queries are redirected, such as 127.0.0.11
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    resolvers: Vec<IpAddr>,
    /// Inbound ports that are not redirected
    #[arg(long, value_name = "PORT", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(PORT))]
    exclude_inbound_ports: Vec<u16>,
    /// Outbound ports that are not redirected
    #[arg(long, value_name = "PORT", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(PORT))]
    exclude_outbound_ports: Vec<u16>,
    /// Outbound destinations that are not redirected
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = cidr)]
    exclude_destinations: Vec<Cidr>,
    /// Network interfaces whose traffic is not redirected
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    exclude_interfaces: Vec<String>,
    /// Users whose outbound traffic is not redirected
    #[arg(long, value_name = "UID", value_delimiter = ',')]
    exclude_users: Vec<u32>,
    /// Drop traffic that would bypass the proxy: inbound (with --inbound) or outbound (with --outbound) packets that are
    /// neither redirected nor excluded. Replies are not dropped
    #[arg(long)]
    strict: bool,
    /// Redirect replies to the proxy; required when it connects from client addresses
    #[arg(long)]
    keep_source: bool,
    /// User ID of the proxy, to exempt its traffic when it may not set packet marks
    #[arg(long, value_name = "UID")]
    uid: Option<u32>,
    /// Owner name in the comment of the table
    #[arg(long, default_value = "weft", value_name = "NAME")]
    owner: String,
}

/// The `--backend` option.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum BackendArg {
    /// nf_tables; iptables if the kernel has no nf_tables
    Auto,
    /// nf_tables over netlink; needs no external command
    Native,
    /// nf_tables with the nft command
    Nft,
    /// iptables with the iptables-restore and ip6tables-restore commands
    Iptables,
}

impl BackendArg {
    /// The backend choice that the option names.
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

pub(super) fn run(arguments: RedirectArgs, log: &str) -> Result<(), CommandError> {
    match arguments.command {
        RedirectCommand::Plan(wanted) => {
            // A plan can be printed on a host that has no backend.
            let backend = match wanted.backend.choice() {
                BackendChoice::Only(backend) => backend,
                BackendChoice::Auto => {
                    BackendChoice::Auto.resolve().unwrap_or(RedirectBackend::Native)
                }
            };
            print_line(plan(&wanted.redirect(), backend).map_err(explain)?.trim_end());
            Ok(())
        }
        RedirectCommand::Apply(wanted) => {
            let backend = wanted.backend.choice().resolve().map_err(explain)?;
            let redirect = wanted.redirect();
            apply_once(&redirect, backend, &wanted.place.namespace()).map_err(explain)?;
            print_line(&format!(
                "installed with {backend}: owner={} hash={}",
                redirect.owner,
                redirect.hash()
            ));
            Ok(())
        }
        RedirectCommand::Verify(wanted) => {
            let backend = wanted.backend.choice().resolve().map_err(explain)?;
            match verify(&wanted.redirect(), backend, &wanted.place.namespace()).map_err(explain)? {
                RedirectState::InSync => {
                    print_line("in sync");
                    Ok(())
                }
                RedirectState::NotInstalled => {
                    Err(CommandError::Failed("no rules of weft are installed".into()))
                }
                RedirectState::Drifted(how) => Err(CommandError::Failed(format!(
                    "installed rules differ from the options:\n{}",
                    how.join("\n")
                ))),
            }
        }
        RedirectCommand::Diff(wanted) => {
            let backend = wanted.backend.choice().resolve().map_err(explain)?;
            match verify(&wanted.redirect(), backend, &wanted.place.namespace()).map_err(explain)? {
                RedirectState::InSync => return Ok(()),
                RedirectState::NotInstalled => print_line("no rules of weft are installed"),
                RedirectState::Drifted(how) => how.iter().for_each(|line| print_line(line)),
            }
            Err(CommandError::Failed("installed rules differ from the options".into()))
        }
        RedirectCommand::Probe(wanted) => {
            match probe(&wanted.redirect(), &wanted.place.namespace()).map_err(explain)? {
                failed @ ProbeOutcome::NotRedirected(..) => {
                    Err(CommandError::Failed(failed.to_string()))
                }
                outcome => {
                    print_line(&outcome.to_string());
                    Ok(())
                }
            }
        }
        RedirectCommand::Guard { file } => guard(&file, log),
        RedirectCommand::Remove(place) => {
            redirects::remove_all(&place.namespace()).map_err(explain)
        }
    }
}

/// Maintains the redirects of a file until a shutdown signal.
fn guard(file: &Path, log: &str) -> Result<(), CommandError> {
    weft_runtime::log::start(log).map_err(CommandError::Usage)?;
    let drain = Drain::new(Duration::ZERO);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| CommandError::Failed(error.to_string()))?;
    let _guard = redirects::guard(file).map_err(CommandError::Usage)?;
    runtime.block_on(async {
        drain_on_signals(&drain).map_err(|error| CommandError::Failed(error.to_string()))?;
        drain.reached(Phase::Draining).await;
        Ok(())
    })
}

impl RuleArgs {
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

impl NamespaceArgs {
    fn namespace(&self) -> Namespace {
        self.netns.clone().map_or(Namespace::Own, Namespace::At)
    }
}

fn explain(error: RedirectError) -> CommandError {
    match error {
        RedirectError::Invalid(text) => CommandError::Usage(text),
        other => CommandError::Failed(other.to_string()),
    }
}
