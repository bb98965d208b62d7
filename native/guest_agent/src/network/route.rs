//! Routes of the main table.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use protocols::agent::{Routes, UpdateRoutesRequest};
use protocols::agent_types::{IPFamily, Route};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope,
};

use super::address::{Prefix, ip_address};
use super::interface::family;
use super::{Netlink, NetlinkContext, link_name};
use crate::error::{AgentError, Result};

/// Adds or replaces routes, those without a gateway first: they make the gateways reachable.
/// Nothing is deleted. The reply is the table.
///
/// # Errors
/// A route is malformed, its link is unknown, or the kernel refuses it.
pub(crate) async fn update_routes(request: UpdateRoutesRequest) -> Result<Routes> {
    let mut routes = request
        .routes
        .into_option()
        .ok_or_else(|| AgentError::invalid("request", "routes are missing"))?
        .Routes;
    routes.sort_by_key(|route| !route.gateway.is_empty());
    let netlink = Netlink::open()?;
    for route in &routes {
        let index = netlink.link_index(&route.device).await?;
        let message = message(route, index)?;
        let add = netlink.handle.route().add(message).replace();
        add.execute().await.while_doing("add route")?;
    }
    list(&netlink).await
}

fn message(route: &Route, index: u32) -> Result<RouteMessage> {
    let invalid = |what: &str| AgentError::invalid("route", what);
    let is_v6 = route.family.enum_value_or_default() == IPFamily::v6;
    let scope = u8::try_from(route.scope).map_err(|_| invalid("scope"))?;
    let destination = if route.dest.is_empty() {
        Prefix {
            address: if is_v6 {
                Ipv6Addr::UNSPECIFIED.into()
            } else {
                Ipv4Addr::UNSPECIFIED.into()
            },
            length: 0,
        }
    } else {
        route.dest.parse()?
    };
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .protocol(RouteProtocol::Boot)
        .scope(RouteScope::from(scope))
        .output_interface(index)
        .destination_prefix(destination.address, destination.length)
        .map_err(|_| invalid("destination"))?;
    if !route.source.is_empty() {
        let source: Prefix = route.source.parse()?;
        // A bare address is the one to prefer; RTA_SRC is for source routing, which nobody means.
        builder = builder
            .pref_source(source.address)
            .map_err(|_| invalid("source"))?;
    }
    if !route.gateway.is_empty() {
        builder = builder
            .gateway(ip_address(&route.gateway)?)
            .map_err(|_| invalid("gateway"))?;
    }
    let mut message = builder.build();
    message.header.flags = RouteFlags::from_bits_retain(route.flags);
    if route.mtu > 0 {
        let metrics = RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]);
        message.attributes.push(metrics);
    }
    Ok(message)
}

/// # Errors
/// The kernel refuses.
pub(crate) async fn list_routes() -> Result<Routes> {
    list(&Netlink::open()?).await
}

async fn list(netlink: &Netlink) -> Result<Routes> {
    let links = netlink.links().await?;
    let name_of = |index: u32| {
        let link = links.iter().find(|link| link.header.index == index);
        link.and_then(link_name).unwrap_or_default().to_owned()
    };
    let mut response = Routes::new();
    for query in [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ] {
        let messages = netlink.handle.route().get(query).execute();
        let messages: Vec<RouteMessage> =
            messages.try_collect().await.while_doing("list routes")?;
        let main = messages
            .iter()
            .filter(|message| message.header.table == RouteHeader::RT_TABLE_MAIN);
        response
            .Routes
            .extend(main.map(|message| route(message, &name_of)));
    }
    Ok(response)
}

fn route(message: &RouteMessage, name_of: &dyn Fn(u32) -> String) -> Route {
    let mut route = Route::new();
    route.scope = u32::from(u8::from(message.header.scope));
    route.flags = message.header.flags.bits();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                if let Some(address) = ip(address) {
                    route.family = family(address).into();
                    let length = message.header.destination_prefix_length;
                    route.dest = format!("{address}/{length}");
                }
            }
            RouteAttribute::Gateway(address) => {
                if let Some(address) = ip(address) {
                    route.family = family(address).into();
                    route.gateway = address.to_string();
                }
            }
            RouteAttribute::PrefSource(address) => {
                route.source = ip(address)
                    .map(|source| source.to_string())
                    .unwrap_or_default();
            }
            RouteAttribute::Oif(index) => route.device = name_of(*index),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu = *mtu;
                    }
                }
            }
            _ => {}
        }
    }
    route
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(dest: &str, gateway: &str, family: IPFamily) -> Route {
        let mut route = Route::new();
        route.dest = dest.into();
        route.gateway = gateway.into();
        route.family = family.into();
        route
    }

    #[test]
    fn default_route_has_its_family_and_no_prefix() {
        let message = message(&wire("", "10.0.0.1", IPFamily::v4), 2).unwrap();
        assert_eq!(message.header.destination_prefix_length, 0);
        let back = route(&message, &|index| format!("eth{index}"));
        assert_eq!(back.gateway, "10.0.0.1");
        assert_eq!(back.device, "eth2");
    }

    #[test]
    fn destination_and_mtu_survive_the_way_there_and_back() {
        let mut source = wire("fd00::/64", "", IPFamily::v6);
        source.mtu = 1400;
        let back = route(&message(&source, 1).unwrap(), &|_| String::new());
        assert_eq!((back.dest.as_str(), back.mtu), ("fd00::/64", 1400));
    }

    #[test]
    fn mixed_families_and_bad_scopes_are_invalid() {
        assert!(message(&wire("fd00::/64", "x", IPFamily::v6), 1).is_err());
        let mut source = wire("10.0.0.0/8", "", IPFamily::v4);
        source.scope = 999;
        assert!(message(&source, 1).is_err());
    }
}
