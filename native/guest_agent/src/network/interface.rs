//! Interfaces: found by hardware address, given their addresses, name and MTU.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use futures_util::TryStreamExt;
use protocols::agent::{Interfaces, UpdateInterfaceRequest};
use protocols::agent_types::{IPAddress, IPFamily, Interface};
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use super::address::{MacAddress, Prefix};
use super::{Netlink, NetlinkContext, link_name};
use crate::device::{Devices, PciPath};
use crate::error::{AgentError, Result};

/// Sets an interface up as the request says, and brings it up.
///
/// # Errors
/// It does not exist (in time), a value is malformed, or the kernel refuses one.
pub(crate) async fn update_interface(
    request: UpdateInterfaceRequest,
    devices: &Devices,
) -> Result<Interface> {
    let wanted = request
        .interface
        .into_option()
        .ok_or_else(|| AgentError::invalid("request", "interface is missing"))?;
    let addresses = wanted
        .IPAddresses
        .iter()
        .map(Prefix::try_from)
        .collect::<Result<Vec<_>>>()?;
    let mac: MacAddress = wanted.hwAddr.parse()?;
    let mtu = u32::try_from(wanted.mtu)
        .map_err(|_| AgentError::invalid("mtu", wanted.mtu.to_string()))?;
    if !wanted.devicePath.is_empty() {
        let path = PciPath::parse(&wanted.devicePath)?;
        let look = || path.find_interface(Path::new("/sys"));
        devices.wait_for(&wanted.devicePath, look).await?;
    }

    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    let link = find(&links, mac, &wanted.name)?;
    let index = link.header.index;
    let change = |builder: LinkMessageBuilder<LinkUnspec>, operation| {
        let request = netlink.handle.link().set(builder.build());
        async move { request.execute().await.while_doing(operation) }
    };
    let builder = || LinkUnspec::new_with_index(index);
    if link.header.flags.contains(LinkFlags::Up) {
        change(builder().down(), "take link down").await?;
    }
    if !has_mac(link, mac) {
        change(builder().address(mac.0.to_vec()), "set hardware address").await?;
    }
    let owner = links
        .iter()
        .find(|other| link_name(other) == Some(wanted.name.as_str()));
    if let Some(owner) = owner.filter(|owner| owner.header.index != index) {
        // Names are unique: the owner steps aside, and gets the name this link had.
        rename_owner(&netlink, owner.header.index, &wanted.name, link, index).await?;
    }
    let mut settings = builder().arp(wanted.raw_flags & libc::IFF_NOARP.cast_unsigned() == 0);
    if !wanted.name.is_empty() {
        settings = settings.name(wanted.name.clone());
    }
    if mtu > 0 {
        settings = settings.mtu(mtu);
    }
    change(settings, "set link").await?;
    change(builder().up(), "bring link up").await?;
    // The kernel drops IPv6 addresses with the link, so they come after it.
    for prefix in addresses {
        if prefix.address.is_ipv6() && is_ipv6_disabled() {
            continue;
        }
        let mut add = netlink
            .handle
            .address()
            .add(index, prefix.address, prefix.length);
        if prefix.address.is_ipv6() {
            // The pod had it before: whether it is somebody else's was asked then, and asking again
            // leaves a container without its address for the first second of its life.
            add.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        add.replace().execute().await.while_doing("add address")?;
    }
    Ok(wanted)
}

async fn rename_owner(
    netlink: &Netlink,
    owner: u32,
    name: &str,
    link: &LinkMessage,
    index: u32,
) -> Result<()> {
    let set = |index: u32, name: String| {
        let message = LinkUnspec::new_with_index(index).name(name).build();
        let request = netlink.handle.link().set(message);
        async move { request.execute().await.while_doing("rename link") }
    };
    let down = LinkUnspec::new_with_index(owner).down().build();
    let request = netlink.handle.link().set(down);
    request.execute().await.while_doing("take link down")?;
    // A name has 15 bytes at most.
    let spare: String = name.chars().take(10).collect::<String>() + "_temp";
    set(owner, spare).await?;
    set(index, name.to_owned()).await?;
    match link_name(link) {
        Some(old) => set(owner, old.to_owned()).await,
        None => Ok(()),
    }
}

fn find<'a>(links: &'a [LinkMessage], mac: MacAddress, name: &str) -> Result<&'a LinkMessage> {
    links
        .iter()
        .find(|link| has_mac(link, mac))
        .or_else(|| links.iter().find(|link| link_name(link) == Some(name)))
        .ok_or_else(|| {
            AgentError::invalid("interface", format!("no link has {mac} or is {name:?}"))
        })
}

fn has_mac(link: &LinkMessage, mac: MacAddress) -> bool {
    link.attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::Address(bytes) if *bytes == mac.0))
}

fn is_ipv6_disabled() -> bool {
    ["all", "default"].iter().all(|scope| {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
    })
}

/// # Errors
/// The kernel refuses.
pub(crate) async fn list_interfaces() -> Result<Interfaces> {
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    let addresses = netlink.handle.address().get().execute();
    let addresses: Vec<AddressMessage> = addresses
        .try_collect()
        .await
        .while_doing("list addresses")?;
    let mut response = Interfaces::new();
    response.Interfaces = links
        .iter()
        .map(|link| interface(link, &addresses))
        .collect();
    Ok(response)
}

fn interface(link: &LinkMessage, addresses: &[AddressMessage]) -> Interface {
    let mut result = Interface::new();
    link_name(link)
        .unwrap_or_default()
        .clone_into(&mut result.name);
    result.device.clone_from(&result.name);
    result.raw_flags = link.header.flags.bits();
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => result.mtu = u64::from(*mtu),
            LinkAttribute::Address(bytes) => {
                if let Ok(bytes) = <[u8; 6]>::try_from(bytes.as_slice()) {
                    result.hwAddr = MacAddress(bytes).to_string();
                }
            }
            _ => {}
        }
    }
    result.IPAddresses = addresses
        .iter()
        .filter(|address| address.header.index == link.header.index)
        .filter_map(ip)
        .collect();
    result
}

fn ip(message: &AddressMessage) -> Option<IPAddress> {
    let address = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })?;
    let mut result = IPAddress::new();
    result.family = family(address).into();
    result.address = address.to_string();
    result.mask = message.header.prefix_len.to_string();
    Some(result)
}

pub(super) fn family(address: IpAddr) -> IPFamily {
    if address.is_ipv4() {
        IPFamily::v4
    } else {
        IPFamily::v6
    }
}
