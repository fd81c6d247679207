//! Access to the SYN packet that opened a connection, for flow hashes that include its sequence number.

use std::io;
use std::os::fd::AsFd as _;

use nix::sys::socket::setsockopt;
use nix::{libc, setsockopt_impl, sockopt_impl};
use tokio::net::{TcpListener, TcpStream};

use crate::raw::socket_option;

/// The most bytes of a saved SYN: an IP header and a TCP header, both with their longest options.
const SYN_BYTES: usize = 200;

sockopt_impl!(
    /// Whether the kernel saves the SYN of each accepted connection.
    SaveSyn,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_SAVE_SYN,
    bool
);

/// Makes the kernel save, or stop saving, the SYN of each connection accepted from now on, for
/// [`saved_sequence`].
///
/// # Errors
/// When the kernel does not support the option.
pub fn save_syn(socket: &TcpListener, keep: bool) -> io::Result<()> {
    Ok(setsockopt(socket, SaveSyn, &keep)?)
}

/// The sequence number of the SYN that opened a connection. The kernel returns it once. `None` where it saved
/// no SYN, for instance when it answered a SYN flood with cookies.
#[must_use]
pub fn saved_sequence(stream: &TcpStream) -> Option<u32> {
    let mut syn = [0; SYN_BYTES];
    // From the IP header to the end of the TCP header; empty when no SYN was saved.
    let level = libc::IPPROTO_TCP;
    let name = libc::TCP_SAVED_SYN;
    let length = socket_option(stream.as_fd(), level, name, &mut syn).ok()?;
    sequence_of(syn.get(..length)?)
}

/// The sequence number of a TCP packet (RFC 9293, section 3.1) after an IP header (RFC 791, section 3.1; RFC
/// 8200, sections 3 and 4).
fn sequence_of(packet: &[u8]) -> Option<u32> {
    const TCP: u8 = 6;
    const SEQUENCE: usize = 4;
    let first = *packet.first()?;
    let tcp = match first >> 4 {
        4 => usize::from(first & 0xf) * 4,
        _ => {
            let mut next = *packet.get(6)?;
            let mut at = 40;
            // Each extension header has the type of the next header, then its own length in units of eight
            // bytes.
            while next != TCP {
                let length = usize::from(*packet.get(at + 1)?);
                next = *packet.get(at)?;
                at += (length + 1) * 8;
            }
            at
        }
    };
    packet.get(tcp + SEQUENCE..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

    use super::*;
    use crate::socket::listen_tcp;

    #[test]
    fn sequence_number_is_found_after_ip_options_and_extension_headers() {
        let tcp = [0x12, 0x34, 0, 80, 0xde, 0xad, 0xbe, 0xef, 0, 0, 0, 0];
        let v4 = |words: u8| {
            let mut header = vec![0; usize::from(words) * 4];
            header[0] = 0x40 | words;
            [header.as_slice(), &tcp].concat()
        };
        let v6 = |next: u8, between: &[u8]| {
            let mut header = vec![0; 40];
            header[0] = 0x60;
            header[6] = next;
            [header.as_slice(), between, &tcp].concat()
        };
        let options = [[60, 1, 0, 0, 0, 0, 0, 0], [0; 8], [6, 0, 0, 0, 0, 0, 0, 0]].concat();
        for packet in [v4(5), v4(15), v6(6, &[]), v6(0, &options)] {
            assert_eq!(sequence_of(&packet), Some(0xdead_beef), "{packet:?}");
            for end in 0..packet.len() - 4 {
                assert_eq!(sequence_of(&packet[..end]), None, "cut at {end}: {packet:?}");
            }
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn sequence_number_is_saved_only_while_enabled_and_returned_once() {
        let hosts: [SocketAddr; 2] =
            [(Ipv4Addr::LOCALHOST, 0).into(), (Ipv6Addr::LOCALHOST, 0).into()];
        for host in hosts {
            let listener = listen_tcp(host, false).expect("a port is free");
            let address = listener.local_addr().expect("the socket is bound");
            for keep in [true, false] {
                save_syn(&listener, keep).expect("the kernel supports the option");
                let _client = TcpStream::connect(address).await.expect("the socket listens");
                let (accepted, _) = listener.accept().await.expect("a client has connected");
                assert_eq!(saved_sequence(&accepted).is_some(), keep, "{address}");
                assert_eq!(saved_sequence(&accepted), None, "the kernel returns it once");
            }
        }
    }
}
