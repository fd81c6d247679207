//! The request of `weft why`, in the form that routes and policies evaluate.

use std::net::{IpAddr, Ipv4Addr};

use weft_control::mesh::Port;
use weft_model::path::{PathReading, PathReadings};
use weft_model::{RequestFacts, SpiffeId, query_parameter};

/// A request as the caller sends it.
#[derive(Debug)]
pub(super) struct WhyRequest<'a> {
    pub(super) caller: SpiffeId,
    pub(super) method: &'a str,
    /// The path with its query.
    pub(super) target: &'a str,
    /// The `host` header.
    pub(super) authority: &'a str,
    pub(super) headers: &'a [(String, String)],
    pub(super) address: Option<IpAddr>,
    /// The name of the issuer in `mesh.yaml`, and its `iss` claim.
    pub(super) token: Option<(&'a str, &'a str)>,
    pub(super) claims: &'a [(String, String)],
}

/// The request as it arrives at one port, after rewrites.
#[derive(Debug)]
pub(super) struct Arrival<'a> {
    request: &'a WhyRequest<'a>,
    target: &'a str,
    port: &'a Port,
    /// The possible readings of the path by services; none when there is only one.
    readings: Option<PathReadings>,
}

impl<'a> Arrival<'a> {
    pub(super) fn new(request: &'a WhyRequest<'a>, target: &'a str, port: &'a Port) -> Self {
        let readings = match target {
            "*" => Some(PathReadings::of_asterisk()),
            _ => PathReadings::of(target.split('?').next().unwrap_or_default()),
        };
        Self { request, target, port, readings }
    }

    pub(super) fn token(&self) -> Option<(&'a str, &'a str)> {
        self.request.token
    }

    pub(super) fn has_address(&self) -> bool {
        self.request.address.is_some()
    }

    pub(super) fn readings(&self) -> Option<&PathReadings> {
        self.readings.as_ref()
    }

    /// The request for route matching: with the first reading of its path.
    pub(super) fn routed(&self) -> ArrivalFacts<'_> {
        self.facts(0)
    }

    /// The request for policies: once with each reading of its path.
    pub(super) fn each(&self) -> impl Iterator<Item = ArrivalFacts<'_>> {
        let count = self.readings.as_ref().map_or(1, |readings| readings.iter().count());
        (0..count).map(|index| self.facts(index))
    }

    fn facts(&self, index: usize) -> ArrivalFacts<'_> {
        let reading = self.readings.as_ref().and_then(|readings| readings.get(index));
        ArrivalFacts { arrival: self, reading }
    }
}

/// A request with one reading of its path.
#[derive(Debug, Clone, Copy)]
pub(super) struct ArrivalFacts<'a> {
    arrival: &'a Arrival<'a>,
    reading: Option<&'a PathReading>,
}

impl<'a> ArrivalFacts<'a> {
    fn request(&self) -> &'a WhyRequest<'a> {
        self.arrival.request
    }
}

impl RequestFacts for ArrivalFacts<'_> {
    fn method(&self) -> &str {
        self.request().method
    }

    fn path(&self) -> &str {
        let as_sent = || self.arrival.target.split('?').next().unwrap_or_default();
        self.reading.map_or_else(as_sent, PathReading::path)
    }

    fn path_fits(&self, fits: &mut dyn FnMut(&str) -> bool) -> bool {
        match self.reading {
            Some(reading) => reading.fits(fits),
            None => fits(self.path()),
        }
    }

    fn target_fits(&self, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        let target = self.arrival.target;
        match self.reading {
            Some(reading) => {
                let query = target.find('?').and_then(|at| target.get(at..));
                let query = query.unwrap_or_default();
                reading.fits(&mut |path| fits(format!("{path}{query}").as_bytes()))
            }
            None => fits(target.as_bytes()),
        }
    }

    fn scheme(&self) -> &'static str {
        "http"
    }

    fn authority(&self) -> &str {
        self.request().authority
    }

    fn has_header(&self, name: &str, fits: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        let mut all = self.request().headers.iter();
        all.any(|(known, value)| known.eq_ignore_ascii_case(name) && fits(value.as_bytes()))
    }

    fn query(&self, name: &str) -> Option<&str> {
        query_parameter(self.arrival.target, name)
    }

    fn has_claim(&self, name: &str, way: &[String], fits: &mut dyn FnMut(&str) -> bool) -> bool {
        match (self.request().token, way) {
            (Some((shown, issuer)), [claim]) if shown == name => {
                let mut all = self.request().claims.iter();
                (claim == "iss" && fits(issuer))
                    || all.any(|(known, value)| known == claim && fits(value))
            }
            _ => false,
        }
    }

    fn peer(&self) -> Option<&SpiffeId> {
        Some(&self.request().caller)
    }

    /// Without `--address`, no clause of the port uses the address.
    fn remote_address(&self) -> IpAddr {
        self.request().address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
    }

    fn client_address(&self) -> IpAddr {
        self.remote_address()
    }

    /// No policy of `mesh.yaml` uses the destination address.
    fn destination_address(&self) -> IpAddr {
        Ipv4Addr::UNSPECIFIED.into()
    }

    fn destination_port(&self) -> u16 {
        self.arrival.port.target
    }
}
