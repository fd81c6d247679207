//! TCP and UDP flows of the demo client to the echo service.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use super::service::ECHO_PORT;

/// An open connection to the echo service.
pub(super) struct DemoFlow {
    runtime: tokio::runtime::Runtime,
    stream: BufReader<TcpStream>,
}

/// Opens a TCP flow to a virtual IP; returns it with the name of the endpoint that answered.
pub(super) fn echo_flow(service: IpAddr) -> Result<(DemoFlow, String), String> {
    echo_flow_from(service, 0)
}

/// As [`echo_flow`], from this source port; 0: any free port.
pub(super) fn echo_flow_from(service: IpAddr, port: u16) -> Result<(DemoFlow, String), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let connecting = async {
        let socket = if service.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.bind(SocketAddr::new(any(service), port))?;
        socket.connect((service, ECHO_PORT).into()).await
    };
    let stream = runtime
        .block_on(connecting)
        .map_err(|error: io::Error| format!("cannot connect to the echo service: {error}"))?;
    let mut flow = DemoFlow { runtime, stream: BufReader::new(stream) };
    let replica = flow.read_replica()?;
    Ok((flow, replica))
}

impl DemoFlow {
    /// The client address of the flow.
    pub(super) fn client(&self) -> Result<SocketAddr, String> {
        self.stream.get_ref().local_addr().map_err(|error| error.to_string())
    }

    /// Sends a line; returns the name of the endpoint that answered.
    pub(super) fn say(&mut self, text: &str) -> Result<String, String> {
        let line = format!("{text}\n");
        let sent = self.stream.get_mut().write_all(line.as_bytes());
        self.runtime.block_on(sent).map_err(|error| format!("the flow broke: {error}"))?;
        self.read_replica()
    }

    fn read_replica(&mut self) -> Result<String, String> {
        let mut line = String::new();
        let reading = async {
            tokio::time::timeout(Duration::from_secs(10), self.stream.read_line(&mut line)).await
        };
        match self.runtime.block_on(reading) {
            Ok(Ok(read)) if read > 0 => {
                Ok(line.split_whitespace().next().unwrap_or_default().to_owned())
            }
            Ok(Ok(_)) => Err("the flow was closed".into()),
            Ok(Err(error)) => Err(format!("the flow broke: {error}")),
            Err(_) => Err("the echo service did not answer".into()),
        }
    }
}

/// The unspecified address of the service's family.
fn any(service: IpAddr) -> IpAddr {
    match service {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Opens UDP flows to a virtual IP; returns the names of the endpoints that answered.
///
/// # Errors
/// A flow gets no answer, or moves to another endpoint.
pub(super) async fn udp_flows(service: IpAddr, count: usize) -> Result<BTreeSet<String>, String> {
    let any = any(service);
    let mut replicas = BTreeSet::new();
    for _ in 0..count {
        let socket = UdpSocket::bind((any, 0)).await.map_err(|error| error.to_string())?;
        socket.connect((service, ECHO_PORT + 1)).await.map_err(|error| error.to_string())?;
        let first = datagram(&socket).await?;
        let second = datagram(&socket).await?;
        if first != second {
            return Err(format!("a flow moved from {first} to {second}"));
        }
        replicas.insert(first);
    }
    Ok(replicas)
}

/// Sends a datagram, retries when it is lost; returns the name of the endpoint that answered.
async fn datagram(socket: &UdpSocket) -> Result<String, String> {
    let mut buffer = [0; 256];
    for _ in 0..5 {
        socket.send(b"who is there?").await.map_err(|error| error.to_string())?;
        let answered = tokio::time::timeout(Duration::from_secs(1), socket.recv(&mut buffer)).await;
        if let Ok(Ok(length)) = answered {
            return Ok(
                String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned()
            );
        }
    }
    Err("no answer to a datagram".into())
}
