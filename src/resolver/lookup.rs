//! DNS lookups with the settings of the host: `/etc/hosts`, then the servers, search list and options of
//! `/etc/resolv.conf`. Both files are reloaded when they change.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::{Hosts, Resolver, TokioResolver, system_conf};
use tokio::time::timeout;
use weft_model::{DnsFamily, DnsQuery};

use super::entry::FamilyAnswer;
pub(super) use super::entry::LookupResult;

/// How long a lookup may take, with all tries, servers and search domains.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest wait for one answer before the question is sent again.
const TRY_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the answer of one family waits for the other. Some servers never answer for IPv6.
const FAMILY_TIMEOUT: Duration = Duration::from_millis(500);
/// The search list is cut here, as in glibc.
const SEARCH_LIMIT: usize = 6;
const FILES: [&str; 2] = ["/etc/hosts", "/etc/resolv.conf"];

/// Creates lookups with the settings of the host.
#[derive(Default)]
pub(super) struct Lookups {
    stamps: [Option<(SystemTime, u64)>; 2],
    system: Option<Arc<System>>,
}

/// The parsed settings of the host.
struct System {
    hosts: Hosts,
    resolver: TokioResolver,
    search: Vec<Name>,
    dots: usize,
}

impl Lookups {
    /// A lookup that ends within [`LOOKUP_TIMEOUT`].
    pub(super) fn begin(
        &mut self,
        query: &DnsQuery,
    ) -> Pin<Box<dyn Future<Output = LookupResult> + Send + 'static>> {
        let name = query.name.clone();
        let family = query.policy.family;
        match self.system() {
            Ok(system) => Box::pin(async move { lookup(&system, &name, family).await }),
            Err(error) => Box::pin(std::future::ready(failed(family, &error))),
        }
    }

    fn system(&mut self) -> Result<Arc<System>, String> {
        let stamps = FILES.map(|file| {
            let metadata = std::fs::metadata(file).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        });
        if let Some(system) = self.system.as_ref().filter(|_| self.stamps == stamps) {
            return Ok(system.clone());
        }
        let system = Arc::new(System::read()?);
        self.stamps = stamps;
        self.system = Some(system.clone());
        Ok(system)
    }
}

impl System {
    fn read() -> Result<Self, String> {
        let (config, mut options) = system_conf::read_system_conf().unwrap_or_else(|error| {
            tracing::debug!(%error, "no usable /etc/resolv.conf, asking a server at 127.0.0.1");
            let server = NameServerConfig::udp_and_tcp(IpAddr::from([127, 0, 0, 1]));
            (ResolverConfig::from_parts(None, Vec::new(), vec![server]), ResolverOpts::default())
        });
        let domain = config.domain().filter(|_| config.search().is_empty());
        let search =
            domain.into_iter().chain(config.search()).take(SEARCH_LIMIT).cloned().collect();
        let dots = options.ndots;
        options.timeout = options.timeout.min(TRY_TIMEOUT);
        options.use_hosts_file = ResolveHosts::Never;
        // `entry` schedules lookups; a cache would delay them.
        options.cache_size = 0;
        let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options;
        let resolver = builder.build().map_err(|error| format!("/etc/resolv.conf: {error}"))?;
        let hosts = Hosts::from_system().unwrap_or_else(|error| {
            tracing::debug!(%error, "no usable /etc/hosts");
            Hosts::default()
        });
        Ok(Self { hosts, resolver, search, dots })
    }
}

/// The addresses in `/etc/hosts`; none when the file does not have the name.
fn in_hosts(hosts: &Hosts, name: &Name, family: DnsFamily) -> Option<LookupResult> {
    let of = |kind| hosts.lookup_static_host(&Query::query(name.clone(), kind));
    let answers = [of(RecordType::A), of(RecordType::AAAA)];
    answers.iter().any(Option::is_some).then(|| {
        let [v4, v6] =
            answers.map(|lookup| match lookup.as_ref().map_or(FamilyAnswer::Absent, answer) {
                // The file has no TTL, and the library's own is a day: the file is read again at the refresh interval.
                FamilyAnswer::Addresses(addresses, _) => {
                    FamilyAnswer::Addresses(addresses, Duration::ZERO)
                }
                other => other,
            });
        LookupResult { v4, v6 }.only(family)
    })
}

async fn lookup(system: &System, name: &str, family: DnsFamily) -> LookupResult {
    let parsed = if name.is_ascii() { Name::from_ascii(name) } else { Name::from_utf8(name) };
    let parsed = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return failed(family, &format!("invalid host name: {error}")),
    };
    if let Some(found) = in_hosts(&system.hosts, &parsed, family) {
        return found;
    }
    let names = candidates(&parsed, &system.search, system.dots);
    let names = &names;
    let ask = |kind| async move {
        let asked = timeout(LOOKUP_TIMEOUT, search(system, names, kind)).await;
        asked.unwrap_or_else(|_| FamilyAnswer::Failed("no answer from a DNS server".into()))
    };
    let (asks_v4, asks_v6) = families(family);
    let v4 = async { if asks_v4 { ask(RecordType::A).await } else { FamilyAnswer::Unasked } };
    let v6 = async { if asks_v6 { ask(RecordType::AAAA).await } else { FamilyAnswer::Unasked } };
    let mut found = both(v4, v6).await;
    if family == DnsFamily::Auto && matches!(found.v4, FamilyAnswer::Addresses(..)) {
        found.v6 = routed(found.v6);
    }
    found
}

/// Waits for both answers; after the first addresses, waits only [`FAMILY_TIMEOUT`] for the other family.
async fn both(
    v4: impl Future<Output = FamilyAnswer> + Send,
    v6: impl Future<Output = FamilyAnswer> + Send,
) -> LookupResult {
    fn remaining_wait(first: &FamilyAnswer) -> Duration {
        match first {
            FamilyAnswer::Addresses(..) => FAMILY_TIMEOUT,
            FamilyAnswer::Unasked | FamilyAnswer::Absent | FamilyAnswer::Failed(_) => {
                LOOKUP_TIMEOUT
            }
        }
    }
    let late = |_| FamilyAnswer::Failed("no answer in time".into());
    tokio::pin!(v4, v6);
    tokio::select! {
        v4 = &mut v4 => {
            let v6 = timeout(remaining_wait(&v4), v6).await.unwrap_or_else(late);
            LookupResult { v4, v6 }
        }
        v6 = &mut v6 => {
            let v4 = timeout(remaining_wait(&v6), v4).await.unwrap_or_else(late);
            LookupResult { v4, v6 }
        }
    }
}

/// Queries one candidate after the other. The result is `Absent` only if all candidates are absent: a search domain
/// whose server fails might have the name.
async fn search(system: &System, names: &[Name], kind: RecordType) -> FamilyAnswer {
    let mut failure = None;
    for name in names {
        match system.resolver.lookup(name.clone(), kind).await {
            Ok(found) => match answer(&found) {
                FamilyAnswer::Absent => {}
                found => return found,
            },
            Err(error) if is_absence(&error) => {}
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    failure.map_or(FamilyAnswer::Absent, |error| FamilyAnswer::Failed(error.to_string()))
}

/// Whether the server answered that the records do not exist.
fn is_absence(error: &NetError) -> bool {
    matches!(error, NetError::Dns(DnsError::NoRecordsFound(_)))
}

fn answer(lookup: &Lookup) -> FamilyAnswer {
    let records = lookup.answers().iter();
    let found: Vec<(IpAddr, u32)> =
        records.filter_map(|record| Some((record.data.ip_addr()?, record.ttl))).collect();
    match found.iter().map(|(_, ttl)| *ttl).min() {
        None => FamilyAnswer::Absent,
        Some(ttl) => {
            let addresses = found.into_iter().map(|(address, _)| address).collect();
            FamilyAnswer::Addresses(addresses, Duration::from_secs(ttl.into()))
        }
    }
}

/// The names to query, in order, according to `search` and `ndots` of resolv.conf(5).
fn candidates(name: &Name, search: &[Name], dots: usize) -> Vec<Name> {
    let mut whole = name.clone();
    whole.set_fqdn(true);
    if name.is_fqdn() || whole.is_localhost() {
        return vec![whole];
    }
    let is_whole_first = usize::from(name.num_labels()) > dots;
    let mut names: Vec<Name> =
        search.iter().filter_map(|suffix| name.clone().append_domain(suffix).ok()).collect();
    let place = if is_whole_first { 0 } else { names.len() };
    names.insert(place, whole);
    names.dedup();
    names
}

fn families(family: DnsFamily) -> (bool, bool) {
    match family {
        DnsFamily::V4Only => (true, false),
        DnsFamily::V6Only => (false, true),
        DnsFamily::Auto | DnsFamily::V4Preferred | DnsFamily::All => (true, true),
    }
}

impl LookupResult {
    fn only(self, family: DnsFamily) -> Self {
        let (v4, v6) = families(family);
        let keep = |is_asked, answer| if is_asked { answer } else { FamilyAnswer::Unasked };
        Self { v4: keep(v4, self.v4), v6: keep(v6, self.v6) }
    }
}

/// A failed result for each queried family.
pub(super) fn failed(family: DnsFamily, error: &str) -> LookupResult {
    let answer = || FamilyAnswer::Failed(error.to_owned());
    LookupResult { v4: answer(), v6: answer() }.only(family)
}

/// Drops IPv6 addresses without a route; used only when there are IPv4 addresses.
fn routed(answer: FamilyAnswer) -> FamilyAnswer {
    let FamilyAnswer::Addresses(addresses, ttl) = answer else {
        return answer;
    };
    let routed: Vec<IpAddr> = addresses.into_iter().filter(|a| has_route(*a).is_ok()).collect();
    if routed.is_empty() { FamilyAnswer::Absent } else { FamilyAnswer::Addresses(routed, ttl) }
}

/// Connecting a datagram socket sends nothing; it fails without a route.
fn has_route(address: IpAddr) -> io::Result<()> {
    UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?.connect(SocketAddr::new(address, 9))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(name: &str, search: &[&str], dots: usize) -> Vec<String> {
        let parse = |text: &str| Name::from_ascii(text).expect("a name");
        let search: Vec<Name> = search.iter().map(|text| parse(text)).collect();
        candidates(&parse(name), &search, dots).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn candidates_follow_search_and_ndots() {
        let search = ["a.test.", "b.test."];
        assert_eq!(names("web", &search, 1), ["web.a.test.", "web.b.test.", "web."]);
        assert_eq!(names("web.x", &search, 1), ["web.x.", "web.x.a.test.", "web.x.b.test."]);
        assert_eq!(names("web.x", &search, 5), ["web.x.a.test.", "web.x.b.test.", "web.x."]);
        assert_eq!(names("web.", &search, 5), ["web."]);
        assert_eq!(names("my_web", &[], 1), ["my_web."]);
        assert_eq!(names("localhost", &search, 1), ["localhost."]);
    }

    #[test]
    fn addresses_of_the_hosts_file_have_no_ttl() {
        let mut hosts = Hosts::default();
        hosts.read_hosts_conf(&b"10.0.0.1 web\nfd00::1 web\n"[..]).expect("it is readable");
        let web = Name::from_ascii("web").expect("a name");
        let found = in_hosts(&hosts, &web, DnsFamily::All).expect("the file has it");
        let only = |address: &str| {
            FamilyAnswer::Addresses(vec![address.parse().expect("an address")], Duration::ZERO)
        };
        assert_eq!(found, LookupResult { v4: only("10.0.0.1"), v6: only("fd00::1") });
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_of_one_family_wait_only_a_moment_for_the_other() {
        let v4 = || FamilyAnswer::Addresses(vec![IpAddr::from([10, 0, 0, 1])], Duration::ZERO);
        let found = both(std::future::ready(v4()), std::future::pending()).await;
        assert_eq!(found.v4, v4());
        assert!(matches!(found.v6, FamilyAnswer::Failed(_)), "{found:?}");
    }
}
