//! The guest's interfaces, routes and neighbours, over rtnetlink.
//!
//! The pod's network is the guest's root network namespace: what is set here every container sees.
//! A netlink socket per request, so that nothing a request leaves behind reaches the next.

mod address;
mod interface;
mod route;

use futures_util::TryStreamExt;
use protocols::agent::AddARPNeighborsRequest;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::{Handle, new_connection};
use tokio::task::JoinHandle;

pub(crate) use interface::{list_interfaces, update_interface};
pub(crate) use route::{list_routes, update_routes};

use crate::error::{AgentError, IoContext, Result};
use address::{MacAddress, ip_address};

/// A netlink connection that ends with the request.
struct Netlink {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Netlink {
    fn open() -> Result<Self> {
        let (connection, handle, _) = new_connection().during("open netlink socket")?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    async fn links(&self) -> Result<Vec<LinkMessage>> {
        let links = self.handle.link().get().execute();
        links.try_collect().await.while_doing("list links")
    }

    async fn link_index(&self, name: &str) -> Result<u32> {
        let links = self.links().await?;
        links
            .iter()
            .find(|link| link_name(link) == Some(name))
            .map(|link| link.header.index)
            .ok_or_else(|| AgentError::invalid("interface", format!("{name:?} does not exist")))
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn link_name(link: &LinkMessage) -> Option<&str> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
}

/// Adds what was attempted to a netlink error.
trait NetlinkContext<T> {
    fn while_doing(self, operation: &'static str) -> Result<T>;
}

impl<T> NetlinkContext<T> for std::result::Result<T, rtnetlink::Error> {
    fn while_doing(self, operation: &'static str) -> Result<T> {
        self.map_err(|source| AgentError::Netlink { operation, source })
    }
}

/// Adds or replaces neighbours.
///
/// # Errors
/// A neighbour is malformed, its link is unknown, or the kernel refuses it.
pub(crate) async fn add_neighbors(request: AddARPNeighborsRequest) -> Result<()> {
    let neighbors = request
        .neighbors
        .as_ref()
        .ok_or_else(|| AgentError::invalid("request", "neighbors are missing"))?;
    let netlink = Netlink::open()?;
    for neighbor in &neighbors.ARPNeighbors {
        let address = ip_address(&neighbor.toIPAddress.get_or_default().address)?;
        let index = netlink.link_index(&neighbor.device).await?;
        let state = match u16::try_from(neighbor.state) {
            Ok(0) => NeighbourState::Permanent,
            Ok(state) => NeighbourState::from(state),
            Err(_) => return Err(AgentError::invalid("state", neighbor.state.to_string())),
        };
        let flags = u8::try_from(neighbor.flags)
            .map_err(|_| AgentError::invalid("flags", neighbor.flags.to_string()))?;
        let mut add = netlink
            .handle
            .neighbours()
            .add(index, address)
            .state(state)
            .flags(NeighbourFlags::from_bits_retain(flags))
            .replace();
        if !neighbor.lladdr.is_empty() {
            let address: MacAddress = neighbor.lladdr.parse()?;
            add = add.link_layer_address(&address.0);
        }
        add.execute().await.while_doing("add neighbour")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn neighbors_are_needed() {
        let result = add_neighbors(AddARPNeighborsRequest::new()).await;
        assert!(matches!(result, Err(AgentError::Invalid { .. })));
    }

    #[tokio::test]
    async fn loopback_is_listed_and_unknown_links_are_invalid() {
        let interfaces = list_interfaces().await.unwrap();
        assert!(interfaces.Interfaces.iter().any(|entry| entry.name == "lo"));
        let netlink = Netlink::open().unwrap();
        let missing = netlink.link_index("no-such-link").await;
        assert!(matches!(missing, Err(AgentError::Invalid { .. })));
    }
}
